"""``training.switch`` in plan.yaml: whether the steps of a run may be held otherwise on the way,
what is trained among it, and what stands against that.

    training.switch: governed                                       # micro-batch and recomputation
    training.switch: {when: governed, trained: [badam, lora]}       # what is trained as well
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from thrifty.core import typed
from thrifty.core.method_specs import TrainedSpec
from thrifty.core.plan_refresh import looks_again, may_take_over
from thrifty.core.resolve import Spec, method_class, method_names, name_of, parse_spec, resolve

if TYPE_CHECKING:
    from thrifty.core.plan import Plan, Training


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Holding the steps otherwise from some evaluation on, where that is worth it."""

    when: Literal["never", "governed"] = "never"
    trained: tuple[TrainedSpec, ...] = ()
    """What may be trained in place of ``training.memory.trained``, to which the way back is always
    open; empty: what is trained stays."""


def read_switch(value: Any) -> Switch:
    """A word alone says when. Raises ValueError with every mistake."""
    values = {"when": value} if isinstance(value, str) else value
    problems: list[str] = []
    found = typed.read_fields(Switch, values, "", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return found  # type: ignore[no-any-return]


SwitchSpec = Annotated[Switch, read_switch]


def others_trained(training: Training) -> list[Spec]:
    """What may be trained in place of what ``training.memory`` says."""
    own = parse_spec("trained", training.memory.trained)[0]
    return [each for each in training.switch.trained if parse_spec("trained", each)[0] != own]


def asks_others(fixed: Mapping[str, Any]) -> bool:
    """Whether something else may be trained on the way under the keys that a user set."""
    switch = fixed.get("training.switch")
    whole = switch.get("trained") if isinstance(switch, Mapping) else None
    return bool(fixed.get("training.switch.trained", whole))


def trained_as(training: Training, trained: Spec) -> Training:
    """``training`` of something else, at the learning rate that is usual for it."""
    if trained == training.memory.trained:
        return training
    usual, own = (resolve("trained", each) for each in (trained, training.memory.trained))
    return dataclasses.replace(
        training,
        learning_rate=training.learning_rate * usual.learning_rate / own.learning_rate,
        memory=dataclasses.replace(training.memory, trained=trained),
    )


def wrong_switch(plan: Plan) -> Iterator[str]:
    """What stands against it, but for how a step is held, each with what to do."""
    training, switch = plan.training, plan.training.switch
    if switch.when == "never":
        if switch.trained:
            yield "training.switch.trained says what else may be trained: when: governed, for that"
        return
    if training.devices > 1 or plan.task == "preference":
        yield "training.switch: a run on several devices, or on pairs, is held as planned"
    if switch.trained:
        yield from _wrong_trained(plan)


def _wrong_trained(plan: Plan) -> Iterator[str]:
    training, key = plan.training, "training.switch.trained"
    own, options = parse_spec("trained", training.memory.trained)
    named = [parse_spec("trained", each) for each in training.switch.trained]
    names = [name for name, _ in named]
    for name in sorted({own, *names}):
        if not _switches(name):
            fit = [each for each in sorted(method_names("trained")) if _switches(each)]
            yield (
                f"{key}: a run cannot go over to {name}, or from it: it does not begin as the "
                f"model is, or leaves what does not merge into its weights; {', '.join(fit)} do"
            )
    if len(set(names)) < len(names):
        yield f"{key}: one is named twice"
    if any(name == own and other not in ({}, options) for name, other in named):
        yield f"{key}: {own} is what the run begins with, as training.memory.trained has it"
    if not others_trained(training):
        yield f"{key} names nothing but {own}, which is trained already"
    if not resolve("weights", training.memory.weights).merges:
        yield (
            f"{key}: an adapter cannot be merged into weights held as {training.memory.weights}: "
            "training.memory.weights: float32 or bfloat16"
        )
    if training.grad_freeze is not None:
        yield f"{key}: training.grad_freeze follows the matrices of one way to the end"
    if plan.selection.refresh.when != "never":
        looking = (looks_again(plan), *may_take_over(plan))
        for scorer in (each for each in looking if each.cost_class == "gradient"):
            yield (
                f"{key}: selection.refresh compares looks of {name_of(scorer)}, which are at the "
                "gradients of what is trained and would be at others: a scorer that goes by the "
                "forward alone, such as perplexity"
            )


def _switches(name: str) -> bool:
    return bool(method_class("trained", name).switches)  # type: ignore[attr-defined]
