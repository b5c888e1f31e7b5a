"""Plan <-> plan.yaml: what was decided, in one file that can be read, edited and run again.

plan.yaml is the only configuration of a run. It is validated whole, with every mistake reported at
once; an unknown key is an error that names the nearest known one. Amounts may be written as people
write them (``memory_bytes: 24GiB``, ``flops: 3e17``). ``why`` gives the rule behind each derived
value; it is prose and decides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from thrifty.core import typed
from thrifty.core.budget import Budget
from thrifty.core.method_specs import (
    ActivationsSpec,
    FilterSpec,
    LossSpec,
    OnlineSpec,
    PickerSpec,
    ScorerSpec,
    StatesSpec,
    StoppingSpec,
    TrainedSpec,
    WeightsSpec,
)
from thrifty.core.objective import Guard, Objective
from thrifty.core.plan_checks import contradictions
from thrifty.core.plan_freeze import GradFreeze
from thrifty.core.plan_pilot import Pilot, wrong_pilot
from thrifty.core.plan_refresh import Refresh
from thrifty.core.plan_switch import Switch, SwitchSpec
from thrifty.core.quantities import Dollars, Tokens, show

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The base model: a folder, or a hub name with the revision that was planned for."""

    path: str
    revision: str | None = None
    sha256: str | None = None
    """Of the weights; training on others is refused. None until the weights were seen."""


@dataclass(frozen=True, kw_only=True)
class PoolSource:
    """The rows to choose from."""

    sources: tuple[str, ...]
    fingerprint: str | None = None
    """Of the content; a pool that changed since is refused."""
    most_masked: float = 0.25
    """Share of the rows that may have nothing to learn (an empty answer, a prompt that fills
    ``training.max_length``); with more there is no plan. They are set aside in any case."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the model should become good at: rows that resemble it.

    ``signal`` rows are shown to scorers, ``dev`` rows steer training, ``test`` rows are looked at
    once, at the end. Where only ``signal`` is given, its rows are split between signal and dev.
    """

    signal: tuple[str, ...]
    dev: tuple[str, ...] = ()
    pilot: tuple[str, ...] = ()
    """By which a pilot chooses; without any it goes by the dev rows."""
    test: tuple[str, ...] = ()
    weight: float = 1.0
    floor: float | None = None
    """By how much the model may be worse on it than the base, in the objective's unit; one that is
    worse by more is not kept. None: by anything."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows to train on."""

    scorer: ScorerSpec = "uniform"
    filters: tuple[FilterSpec, ...] = ("duplicates", "overlap")
    picker: PickerSpec = "top_k"
    max_tokens: Tokens | None = None
    """Tokens of the pool to keep; None keeps all of it."""
    groups: str = ""
    """A column of the pool; rows with one value there are a group. Empty: no groups."""
    quotas: Mapping[str, float] = field(default_factory=dict)
    """Value of that column -> the share of ``max_tokens`` that its rows get at most; the other
    values share the rest evenly."""
    refresh: Refresh = field(default_factory=Refresh)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a training step is held in memory: a technique of each kind, with its options."""

    trained: TrainedSpec = "full"
    """All weights, an adapter on them, a block at a time."""
    weights: WeightsSpec = "float32"
    """How they lie in memory."""
    activations: ActivationsSpec = "keep"
    """What is kept from the forward to the backward."""
    loss: LossSpec = "whole"
    """How many logits exist at a time."""
    states: StatesSpec = "adamw"
    """The optimizer, by what it keeps."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Training on pairs by TRL's ``DPOTrainer``: the better answer likelier than the worse one,
    against what a reference, the model before the first step, makes of the two."""

    beta: float = 0.1
    """How near to the reference the model is kept (arXiv:2305.18290)."""
    precompute_ref_log_probs: bool = True
    """Ask the reference once, before the first step. False: at every step, with the adapter off
    where one is trained, of a frozen copy where all weights are."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One ``Trainer`` run. Fields that reach Hugging Face are spelt as there."""

    memory: MemoryPlan = field(default_factory=MemoryPlan)
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    devices: int = 1
    """That train together, each on a micro-batch of its own; a run starts a process for each."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether each of several devices holds everything, or a share of it."""
    max_length: int = 1024
    """Tokens of a packed sequence; a longer example is cut."""
    max_steps: int = 1
    epochs: float = 1.0
    """Times that the kept tokens are gone through; follows from ``max_steps``, which decides; an
    edit of it is refused."""
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    cooldown_steps: int = 0
    """Steps of the learning rate's decay, reserved in the budget so that any stop ends well."""
    eval_steps: int = 1
    save_steps: int = 1
    online: OnlineSpec = "shuffled"
    """Which of the chosen rows come next while training, and how much their tokens count."""
    replay_share: float = 0.0
    """Continued pretraining: the share of every epoch's tokens drawn from ``replay``."""
    replay: tuple[str, ...] = ()
    switch: SwitchSpec = field(default_factory=Switch)
    """Whether the steps may be held otherwise from some evaluation on (another micro-batch, more or
    less recomputed; something else trained) where that takes less of what is scarce."""
    rewinds: int = 0
    """Times that training may go back to its last checkpoint, and on without the batch that a loss
    or gradient was not finite of; then, and with 0 at once, it stops there."""
    grad_freeze: GradFreeze | None = None
    """Matrices that learn no more are frozen; None: all are trained to the end."""
    preference: Preference | None = None
    """Of task preference, whose batches are pairs; None: of another."""
    seed: int = 0
    report_to: tuple[str, ...] = ()

    @property
    def step_sequences(self) -> int:
        """Of an optimizer step, on all devices together."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return rows * self.devices

    @property
    def is_cut(self) -> bool:
        """Whether each device has a share of the weights alone."""
        return self.parallel == "fsdp" and self.devices > 1

    @property
    def layout(self) -> tuple[int, int]:
        """Devices that share the weights, and replicas that have all of them each."""
        return (self.devices, 1) if self.is_cut else (1, self.devices)

    @property
    def micro_batch_tokens(self) -> int:
        """Of a training pass; evaluations keep to it, so that their memory stays within its own."""
        sides = 1 if self.preference is None else 2
        return self.per_device_train_batch_size * sides * self.max_length


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided before a FLOP was spent."""

    version: int = PLAN_VERSION
    task: Literal["sft", "continued", "preference"] = "sft"
    model: ModelSource
    pool: PoolSource
    targets: Mapping[str, Target] = field(default_factory=dict)
    budget: Budget
    objective: Objective = field(default_factory=Objective)
    guard: Guard | None = None
    selection: Selection = field(default_factory=Selection)
    pilot: Pilot = field(default_factory=Pilot)
    training: Training = field(default_factory=Training)
    stopping: StoppingSpec = "marginal_gain"
    control: bool = False
    """Also train on a uniform choice at equal total cost, on an account of its own."""
    device: str = "local"
    dollars_per_hour: Dollars | None = None
    """The device's price, at which seconds are charged; None: not known."""
    predicted: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """stage -> ``Cost`` as predicted when the plan was made."""
    why: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task == "preference" and self.training.preference is None:
            training = dataclasses.replace(self.training, preference=Preference())
            object.__setattr__(self, "training", training)
        if self.task == "preference" and self.objective.answers is None:
            objective = dataclasses.replace(self.objective, unit="nats/pair")
            object.__setattr__(self, "objective", objective)

    @property
    def floors(self) -> dict[str, float]:
        """Target -> by how much the model may be worse on it than the base."""
        return {name: t.floor for name, t in self.targets.items() if t.floor is not None}


def load(
    path: str | Path, overrides: Sequence[str] = (), chosen: Mapping[str, Any] | None = None
) -> Plan:
    """Read and check a plan.yaml, with what a pilot chose and then ``key.path=value`` overrides
    applied on top."""
    values = read_values(Path(path))
    for key, value in (chosen or {}).items():
        put(values, key, value)
    for override in overrides:
        put(values, *parse_override(override))
    return from_dict(values)


def read_values(path: Path) -> dict[str, Any]:
    """The mapping that a file of a run holds, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"there is no plan at {path}\nhint: `thrifty plan ... -o {path.parent}` makes one"
        ) from None
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}\nhint: a run's plan is the file RUN/plan.yaml"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file\nhint: is it a plan.yaml?") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no plan\nhint: it must be a mapping with model, pool, ...")
    return values


def parse_override(override: str) -> tuple[str, Any]:
    """``"training.seed=1"`` -> ``("training.seed", 1)``."""
    key, sign, text = override.partition("=")
    key = key.strip()
    if not sign or not all(key.split(".")):
        raise ValueError(f"cannot read --set {override!r}\nhint: --set training.seed=1")
    return key, _parse(text, f"--set {override}")


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key.path`` in nested plain values. Raises ValueError where a value is in the way."""
    *parents, last = key.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if child is None:
            child = values[name] = {}
        if not isinstance(child, dict):
            raise ValueError(f"cannot set {key}: {name} holds a value, no keys\nhint: set {name}")
        values = child
    values[last] = value


class _Loader(yaml.SafeLoader):
    """Plain values only. Aliases are refused (a few lines of them make gigabytes), and so is a key
    that stands twice (YAML takes the last and says nothing)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias, which a plan may not hold, in line {mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"a key stands twice, after line {node.start_mark.line + 1}")
        return mapping


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes no Python objects
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: PyYAML lets a date like 2024-13-01 through to its constructor
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where} is not valid YAML: {reason:.300}\nhint: mend that line, or plan again"
        ) from None


def from_dict(values: Mapping[str, Any]) -> Plan:
    """A checked plan. Raises ValueError that lists every mistake, one a line."""
    if values.get("version", PLAN_VERSION) != PLAN_VERSION:
        raise ValueError(
            f"the plan has version {show(values['version'])}, this thrifty reads {PLAN_VERSION}\n"
            "hint: use the thrifty version that made it, or plan again"
        )
    problems: list[str] = []
    plan = typed.read_fields(Plan, values, "", problems)
    if not problems:
        problems += contradictions(plan)
    if problems:
        hint = "hint: mend these in plan.yaml (or in --set), or plan again"
        raise ValueError("\n".join(["the plan cannot be used:", *problems, hint]))
    return plan


def read_budget(values: Mapping[str, Any]) -> Budget:
    """A checked budget from plain values. Raises ValueError that lists every mistake."""
    problems: list[str] = []
    budget = typed.read_fields(Budget, values, "budget", problems)
    if problems:
        raise ValueError("\n".join([*problems, "hint: --set budget.flops=3e17"]))
    return budget


def read_pilot(values: Mapping[str, Any]) -> Pilot:
    """A checked pilot from plain values. Raises ValueError that lists every mistake."""
    problems: list[str] = []
    pilot = typed.read_fields(Pilot, values, "pilot", problems)
    problems += [] if problems else wrong_pilot(pilot)
    if problems:
        raise ValueError("\n".join([*problems, "hint: --set pilot.share=0.1"]))
    return pilot


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values, in the order of the fields; what is at its default is kept, to be seen."""
    return _plain(dataclasses.asdict(plan))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class _Dumper(yaml.SafeDumper):
    """What it writes is read back as it was, by any YAML reader."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "." not in text:  # 3e+17 is text to YAML 1.1, 3.0e+17 a number
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # Between other quotes PyYAML does not escape what it reads back as a line break (U+0085).
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)


def dump(plan: Plan) -> str:
    """The text of plan.yaml; ``from_dict(yaml.safe_load(dump(plan))) == plan``."""
    head = (
        "# A thrifty plan. Edit it and `thrifty run` this folder; `why` says where values came from"
    )
    body = yaml.dump(to_dict(plan), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96)
    return f"{head}\n{body}"
