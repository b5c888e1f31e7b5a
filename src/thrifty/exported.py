"""What exporters are given of a run, and what they gather: settings, and what has none there.

A technique that decides what fits in memory, and that the other program lacks, is refused unless
the user takes the nearest that it has; everything else that does not translate is listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from thrifty.core.contracts import MemoryTechnique
from thrifty.core.plan import Plan, Training
from thrifty.core.resolve import name_of
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.memory_plan import Techniques

Form = Literal["text", "strings", "messages", "turns"]
"""Of rows: a text; prompt and completion as strings; messages; prompt and completion as messages"""

TRAIN, VALIDATION = "train", "validation"
"""What the files of chosen and of dev rows are called, in ``DATA``."""
DATA = "data"
Known = Mapping[str, Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]]
"""A technique's name -> a program's settings for it."""
LION_BETA2 = 0.99  # arXiv:2302.06675; transformers gives Lion Adam's


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A run as exporters see it."""

    plan: Plan
    techniques: Techniques
    setting: MemorySetting
    """How a step is held."""
    shape: ModelShape
    base: str
    """An absolute path, or a name on the hub."""
    form: Form
    has_dev: bool
    begin: str = ""
    """The special token that the tokenizer puts before a text, written out."""
    end: str = ""
    """That of the end of a sequence."""

    @property
    def training(self) -> Training:
        return self.plan.training

    @property
    def has_adapter(self) -> bool:
        return self.setting.adapter is not None

    @property
    def adapter_targets(self) -> list[str]:
        """Names of the linears that have an adapter."""
        adapter = self.setting.adapter
        return [] if adapter is None else list(adapter.names(self.shape))

    @property
    def adapter_rank(self) -> int:
        return 0 if self.setting.adapter is None else self.setting.adapter.rank

    @property
    def in_bfloat16(self) -> bool:
        return self.setting.dtype == "bfloat16"


@dataclass
class Translation:
    """What is gathered for a program."""

    program: str
    settings: dict[str, Any] = field(default_factory=dict)
    untranslated: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """What would take another amount of memory there."""
    packages: list[str] = field(default_factory=list)
    """That it takes besides the program."""

    def put(self, **settings: Any) -> None:
        self.settings.update(settings)

    def lacks(self, what: str, why: str) -> None:
        self.untranslated.append(f"{what}: {why}")

    def cannot_hold(self, kind: str, technique: MemoryTechnique, nearest: str) -> None:
        """The nearest may take more memory."""
        name = name_of(technique)
        self.refused.append(f"training.memory.{kind}: {name}: {self.program} has {nearest} instead")

    def technique(self, kind: str, technique: MemoryTechnique, known: Known, nearest: str) -> None:
        """Gather the settings that ``known`` has for it."""
        name = name_of(technique)
        if name not in known:
            self.unknown(kind, technique, nearest)
            return
        found = known[name]
        self.put(**(found(technique) if callable(found) else found))

    def unknown(self, kind: str, technique: MemoryTechnique, nearest: str) -> None:
        """A technique that this exporter says nothing of: refused where it is there to make a model
        fit."""
        if technique.makes == "fit":
            self.cannot_hold(kind, technique, nearest)
        else:
            name = name_of(technique)
            self.lacks(f"training.memory.{kind}", f"{name} is not there, {nearest} is used")


class Exporter(ABC):
    """Another program, and how a run is written for it."""

    program: ClassVar[str]
    install: ClassVar[str]
    file: ClassVar[str]
    """Of its configuration."""
    command: ClassVar[str]
    """That trains, in the folder of that file."""

    @abstractmethod
    def translate(self, run: Exportable, into: Translation) -> None:
        """Gather the program's settings, and what has none there."""

    @abstractmethod
    def row(self, run: Exportable, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row as the program reads it, from TRL's fields."""

    def files(self, run: Exportable) -> Mapping[str, Any]:
        """Name in ``DATA`` -> content of further JSON files."""
        return {}


# -- the schedule -------------------------------------------------------------------------------


def schedule(training: Training, into: Translation) -> tuple[int, dict[str, Any]]:
    """Warm-up steps and keyword arguments of transformers' ``warmup_stable_decay`` that give the
    rates of ``schedule.py``.

    There a decay of d steps falls by 1 - sqrt(j / d) from j = 0 on, here by 1 - sqrt((j + 1) /
    (cooldown + 1)): the same with one step more that begins one earlier. There a warm-up of w steps
    rises by k / w, here by (k + 1) / w: the same with one step less from a least rate of 1 / w.
    That least rate would hold for the decay as well, so where there are both the warm-up begins at
    nothing.
    """
    warmup, cooldown = training.warmup_steps, training.cooldown_steps
    options: dict[str, Any] = {"num_decay_steps": 0, "decay_type": "1-sqrt"}
    if cooldown:
        options["num_decay_steps"] = cooldown + 1
    if warmup > 1 and cooldown:
        into.lacks(
            "training.warmup_steps",
            f"before step {warmup} the rate is lower, at the first one by "
            f"{training.learning_rate / warmup:g}; from there on it is the same",
        )
    elif warmup > 1:
        options["min_lr_ratio"] = 1 / warmup
    return max(warmup - 1, 0), options


# -- optimizers ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One of ``transformers.training_args.OptimizerNames``."""

    optim: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its ``optim_args``."""
    on_layers: bool = False
    """It is told which modules it projects."""
    beta2: float | None = None
    package: str = ""
    differs: str = ""
    wide: bool = False
    """Its states are float32 where thrifty's have the weights' dtype."""


def _galore(states: Any) -> Optimizer:
    options = {"rank": states.rank, "update_proj_gap": states.refresh, "scale": states.scale}
    return Optimizer(optim="galore_adamw", options=options, on_layers=True, package="galore-torch")


def _apollo(states: Any) -> Optimizer:
    options = {
        "rank": states.rank,
        "update_proj_gap": states.refresh,
        "scale": states.scale**2,  # apollo-torch takes its root
        "scale_type": "tensor" if states.tensor_wise else "channel",
    }
    return Optimizer(
        optim="apollo_adamw",
        options=options,
        on_layers=True,
        package="apollo-torch (not for commercial use)",
    )


_OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda _: Optimizer(optim="adamw_torch_fused"),
    "adamw_8bit": lambda _: Optimizer(optim="adamw_bnb_8bit", package="bitsandbytes"),
    "adamw_4bit": lambda _: Optimizer(
        optim="adamw_torch_4bit",
        package="torchao",
        differs="256 of a state share a scale there, 128 here",
    ),
    "adamw_bf16": lambda _: Optimizer(
        optim="adamw_torch_fused",
        differs="in as many bytes, but updates are rounded to the nearest, which loses small ones",
    ),
    "adamw_offload": lambda _: Optimizer(
        optim="paged_adamw_32bit",
        package="bitsandbytes",
        differs="states go to the host when the device is full, and the step runs on the device",
    ),
    "adafactor": lambda _: Optimizer(optim="adafactor"),
    "lion": lambda _: Optimizer(
        optim="lion_32bit", beta2=LION_BETA2, package="bitsandbytes", wide=True
    ),
    "lion_8bit": lambda _: Optimizer(optim="lion_8bit", beta2=LION_BETA2, package="bitsandbytes"),
    "galore": _galore,
    "apollo": _apollo,
    "sgd": lambda _: Optimizer(optim="sgd"),
    "lomo": lambda _: Optimizer(optim="lomo", package="lomo-optim"),
    "adalomo": lambda _: Optimizer(optim="adalomo", package="lomo-optim"),
}


def optimizer(run: Exportable, into: Translation) -> Optimizer:
    """That of transformers' ``Trainer``, which all of these programs build on; AdamW where there is
    none, which is told or refused."""
    states = run.techniques.states
    name = name_of(states)
    if name not in _OPTIMIZERS:
        into.unknown("states", states, "adamw_torch_fused")
        return Optimizer(optim="adamw_torch_fused")
    found = _OPTIMIZERS[name](states)
    if found.package:
        into.packages.append(found.package)
    if found.differs:
        into.lacks("training.memory.states", f"{name} is {found.optim}: {found.differs}")
    if found.wide and run.in_bfloat16 and not run.has_adapter:
        into.cannot_hold("states", states, f"{found.optim}, whose states are float32,")
    return found


def optim_args(options: Mapping[str, Any]) -> str:
    """As transformers parses them."""
    return ",".join(f"{name}={value}" for name, value in options.items())


def without_decay(run: Exportable, found: Optimizer, into: Translation) -> None:
    """Tell that transformers gives an optimizer that projects no weight decay."""
    if found.on_layers and run.training.weight_decay:
        into.lacks("training.weight_decay", f"{found.optim} is given none by transformers")


def recomputes_all(run: Exportable, into: Translation) -> None:
    """Tell that no layer is left out of recomputation there."""
    if (every := run.setting.recompute) > 1:
        into.lacks(
            "training.memory.activations", f"every layer runs again, not one in every {every}"
        )


def begins_as_lora(run: Exportable, into: Translation) -> None:
    """Tell that an adapter begins at nothing there, in as many bytes."""
    name = name_of(run.techniques.trained)
    into.lacks("training.memory.trained", f"{name} begins as LoRA does, in as many bytes")


def whole(number: float) -> float:
    """An int where it is one."""
    return int(number) if float(number).is_integer() else number


def end_to_end(run: Exportable, into: Translation, setting: str) -> None:
    """Tell that the program lays the packs of a micro-batch end to end, and what to set then."""
    if (packs := run.training.per_device_train_batch_size) > 1:
        into.lacks(
            "attention",
            f"{packs} packs are one row of {packs * run.training.max_length:,} tokens, whose mask "
            f"takes {packs} times the bytes; {setting} needs none",
        )


# -- what no program has ------------------------------------------------------------------------


def common(run: Exportable, into: Translation) -> None:
    """What none of these programs has."""
    plan, training = run.plan, run.training
    program = into.program
    into.lacks(
        "budget and ledger",
        f"{program} trains {training.max_steps:,} steps, whatever they take; nothing is counted",
    )
    into.lacks("stopping", f"{plan.stopping} is not asked whether a step is worth its price")
    if training.online != Training().online:
        into.lacks("training.online", f"{training.online}: rows come in {program}'s own order")
    if training.replay_share:
        into.lacks("training.replay", "replayed rows are not among those written")
    if len(plan.targets) > 1:
        names = ", ".join(plan.targets)
        into.lacks("targets", f"dev rows of {names} are one set, whose loss weighs tokens alike")
    if plan.control:
        into.lacks("control", "there is no run on a uniform choice beside it")
    if plan.model.sha256:
        into.lacks("model.sha256", "whether the base's weights are still those is not looked at")
