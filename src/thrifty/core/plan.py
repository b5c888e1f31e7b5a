"""Plan <-> plan.yaml: what was decided, in one file that can be read, edited and run again.

plan.yaml is the only configuration of a run. It is validated whole, with every mistake reported at
once; an unknown key is an error that names the nearest known one. Amounts may be written as people
write them (``memory_bytes: 24GiB``, ``flops: 3e17``). ``why`` gives the rule behind each derived
value; it is prose and decides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from thrifty.core import typed
from thrifty.core.budget import Budget
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.quantities import Dollars, Tokens, show
from thrifty.core.resolve import Spec, name_of, resolve

PLAN_VERSION = 1


def _method(kind: str) -> Callable[[Any], Spec]:
    """Reads a method's name and options, and looks whether there is such a method."""

    def read(value: Any) -> Spec:
        resolve(kind, value)
        return value

    return read


ScorerSpec = Annotated[Spec, _method("scorer")]
FilterSpec = Annotated[Spec, _method("filter")]
PickerSpec = Annotated[Spec, _method("picker")]
OnlineSpec = Annotated[Spec, _method("online")]
StoppingSpec = Annotated[Spec, _method("stopping")]
TrainedSpec = Annotated[Spec, _method("trained")]
WeightsSpec = Annotated[Spec, _method("weights")]
ActivationsSpec = Annotated[Spec, _method("activations")]
LossSpec = Annotated[Spec, _method("loss")]
StatesSpec = Annotated[Spec, _method("states")]


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


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the model should become good at: rows that resemble it.

    ``signal`` rows are shown to scorers, ``dev`` rows steer training, ``test`` rows are looked at
    once, at the end. Where only ``signal`` is given, its rows are split between signal and dev.
    """

    signal: tuple[str, ...]
    dev: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The one currency of gains in this run."""

    metric: Literal["dev_loss"] = "dev_loss"
    unit: str = "nats/token"
    dollars_per_unit: Dollars | None = None
    """What a unit of gain is worth to the user: the price of what remains. None: zero."""


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
    selection: Selection = field(default_factory=Selection)
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


def load(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a plan.yaml, with ``key.path=value`` overrides applied on top."""
    path = Path(path)
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
    for override in overrides:
        put(values, *parse_override(override))
    return from_dict(values)


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
        problems += _contradictions(plan)
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


def _contradictions(plan: Plan) -> Iterator[str]:
    """What types cannot say."""
    training = plan.training
    positive = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "devices",
        "max_length",
        "max_steps",
        "epochs",
        "learning_rate",
        "eval_steps",
        "save_steps",
    )
    for name in positive:
        if not getattr(training, name) > 0:
            yield f"training.{name} must be more than zero, not {getattr(training, name)}"
    for name in ("warmup_steps", "cooldown_steps", "weight_decay", "max_grad_norm"):
        if getattr(training, name) < 0:
            yield f"training.{name} cannot be negative"
    if training.warmup_steps + training.cooldown_steps > training.max_steps:
        yield (
            f"training.warmup_steps {training.warmup_steps} + cooldown_steps "
            f"{training.cooldown_steps} do not fit in max_steps {training.max_steps}"
        )
    if training.eval_steps > 0 and training.save_steps % training.eval_steps:
        yield (
            f"training.save_steps {training.save_steps} is not a multiple of eval_steps "
            f"{training.eval_steps}: a checkpoint carries its evaluation"
        )
    if not 0 <= training.replay_share < 1:
        yield f"training.replay_share must be in [0, 1), not {training.replay_share}"
    if training.replay_share and (plan.task != "continued" or not training.replay):
        yield "training.replay_share needs task: continued and training.replay with its sources"
    if training.devices > 1:
        yield from _not_on_several(plan)
    if training.preference is not None:
        yield from _wrong_on_pairs(plan, training.preference)
    for kind in MEMORY_KINDS:
        if not resolve(kind, spec := getattr(training.memory, kind)).runs:
            yield f"training.memory.{kind}: {spec} is priced, but a run cannot train with it yet"
    for section, seed in (("training", training.seed), ("selection", plan.selection.seed)):
        if not 0 <= seed < 2**32:
            yield f"{section}.seed must be in [0, 2^32), not {seed}"
    quotas = plan.selection.quotas
    if quotas and not plan.selection.groups:
        yield "selection.quotas needs selection.groups, the column that they are about"
    if quotas and plan.selection.max_tokens is None:
        yield "selection.quotas are shares of selection.max_tokens, which is not set"
    if any(not 0 <= share <= 1 for share in quotas.values()) or sum(quotas.values()) > 1 + 1e-9:
        yield f"selection.quotas must be shares in [0, 1] of together at most 1, not {dict(quotas)}"
    if not plan.model.path:
        yield "model.path is empty"
    if not plan.pool.sources:
        yield "pool.sources is empty"
    for name, target in plan.targets.items():
        if not target.weight > 0:
            yield f"targets.{name}.weight must be more than zero, not {target.weight}"
        if not target.signal:
            yield f"targets.{name}.signal is empty"
    scorer = resolve("scorer", plan.selection.scorer)
    if scorer.needs_target and not plan.targets:
        yield f"selection.scorer {name_of(scorer)} needs a target: add one, or use uniform"
    if plan.task not in scorer.tasks:
        fits = "try uniform or length"
        yield f"selection.scorer {name_of(scorer)} makes no sense for task {plan.task}: {fits}"


def _not_on_several(plan: Plan) -> Iterator[str]:
    """What a run on several devices cannot do."""
    training = plan.training
    online = resolve("online", training.online)
    if training.parallel == "fsdp":
        yield (
            "training.parallel: fsdp is priced, but a run cannot train with it yet (accelerate "
            "shards on GPUs alone, and takes ddp on CPUs without a word): use ddp, which holds "
            "everything on each device"
        )
    if plan.task == "preference":
        yield "training.devices: training on preferences uses one device"
    if online.watches or online.weighs_tokens or online.renewals or online.chooses:
        yield (
            f"training.devices: training.online {name_of(online)} looks at the losses or gradients "
            "of all that is trained on, and each device sees its own alone"
        )


def _wrong_on_pairs(plan: Plan, preference: Preference) -> Iterator[str]:
    if plan.task != "preference":
        yield f"training.preference needs task: preference, not {plan.task}"
        return
    if not preference.beta > 0:
        yield f"training.preference.beta must be more than zero, not {preference.beta}"
    online = resolve("online", spec := plan.training.online)
    if online.chooses or online.watches or online.weighs_tokens or online.cost_class != "free":
        yield f"training.online: {spec} looks at the losses of rows, which pairs have two of"
    looking = [("filters", "filter", each) for each in plan.selection.filters]
    looking.append(("picker", "picker", plan.selection.picker))
    for field_name, kind, method in looking:
        if resolve(kind, method).needs_vectors:
            yield f"selection.{field_name}: {method} takes a vector of each row, and a pair has two"


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
