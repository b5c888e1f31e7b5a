"""Holding the steps of a run otherwise from here on: another micro-batch, more or less recomputed.

A plan is made before the machine was seen at work; where a step turns out to leave memory over,
less recomputation or a larger micro-batch takes less of what is scarce. All ways that are weighed
here train alike: a step has the same sequences in the same order, the weights, the optimizer's
states and the schedule are carried over exactly, through a checkpoint; what changes is the order in
which sums are rounded. The transition (a checkpoint, and loading it) is the option's cost.

    seconds = predicted seconds * measured / predicted, of the way at work;   the peak likewise
    v = what a step takes now / then, of the scarce resource;   gain = L(now + R) - L(now + v R)

A way that was at work before counts as it was measured, the others within ``_ERROR``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thrifty.core.budget import Cost
from thrifty.core.ledger import Stage
from thrifty.core.marginal import Choice, Option, choose
from thrifty.core.plan import Training
from thrifty.core.resolve import parse_spec
from thrifty.costs.setting import MemorySetting
from thrifty.prospect import Prospect

DECISION = "how to hold a step"
STAY = "as it is"
_ACTIVATIONS = ("keep", "selective", "recompute_half", "recompute")
_ERROR = 0.15
"""Relative, of how much faster another way is: that of predicted seconds between two ways on one
machine (docs/costs.md)."""
_MEMORY_MARGIN = 1.03
"""Over a peak predicted from a measured one: as well as peaks are predicted at all."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One way to hold the steps of a run."""

    training: Training
    setting: MemorySetting
    step: Cost
    """On average, as predicted; its peak is the device's."""
    dearest: Cost
    evaluation: Cost

    @property
    def name(self) -> str:
        rows = self.training.per_device_train_batch_size
        times = self.training.gradient_accumulation_steps
        return f"{rows}x{times} {parse_spec('activations', self.training.memory.activations)[0]}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "per_device_train_batch_size": self.training.per_device_train_batch_size,
            "gradient_accumulation_steps": self.training.gradient_accumulation_steps,
            "activations": self.training.memory.activations,
        }


def held_as(training: Training, facts: dict[str, Any]) -> Training:
    """``training`` with its steps held as a checkpoint says."""
    memory = replace(training.memory, activations=facts["activations"])
    sizes = {name: value for name, value in facts.items() if name != "activations"}
    return replace(training, memory=memory, **sizes)


def alike(training: Training) -> Iterator[Training]:
    """All ways to hold the same steps, ``training`` included where it is one of them."""
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    for rows in range(1, sequences + 1):
        if sequences % rows:
            continue
        for activations in _ACTIVATIONS:
            yield replace(
                training,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=sequences // rows,
                memory=replace(training.memory, activations=activations),
            )


@dataclass
class MemorySwitch:
    """Weighs, at evaluations, whether to go on otherwise."""

    holding_of: Callable[[Training], Holding]
    """Raises ValueError where techniques refuse one another."""
    memory_limit: float
    """Bytes that the device may hold."""
    most: int = 2
    """Times in a run."""
    measured: dict[str, Cost] = field(default_factory=dict)
    """Name -> a step and its peak, of the ways that were at work."""

    def consider(
        self,
        step: int,
        now: Holding,
        measured: Cost,
        transition: Cost,
        prospect: Prospect | None,
        stage: Stage,
    ) -> Holding | None:
        """The way to go on; None: as it is. ``measured``: a step as it is, and its peak."""
        self.measured[now.name] = measured
        if prospect is None or len(self.measured) > self.most or not measured.peak_memory_bytes:
            return None
        others = {other.name: other for other in self._others(now, measured)}
        choice = self._weigh(now, list(others.values()), measured, transition, prospect)
        if choice is None:
            return None
        stage.decide(DECISION, choice.chosen or STAY, choice.reason, choice=choice, step=step)
        return None if choice.chosen is None else others[choice.chosen]

    def _others(self, now: Holding, measured: Cost) -> Iterator[Holding]:
        """Those that fit, as far as can be told from what the one at work takes."""
        for training in alike(now.training):
            try:
                other = self.holding_of(training)
            except ValueError:
                continue
            if other.name == now.name:
                continue
            if self._expected(other, now, measured).peak_memory_bytes <= self.memory_limit:
                yield other

    def _expected(self, other: Holding, now: Holding, measured: Cost) -> Cost:
        """A step held so, on this machine."""
        if other.name in self.measured:
            return self.measured[other.name]
        slower = measured.seconds / max(now.step.seconds, 1e-9)
        larger = measured.peak_memory_bytes / max(now.step.peak_memory_bytes, 1.0)
        return replace(
            other.step,
            seconds=other.step.seconds * slower,
            peak_memory_bytes=other.step.peak_memory_bytes * larger * _MEMORY_MARGIN,
        )

    def _weigh(
        self,
        now: Holding,
        others: Sequence[Holding],
        measured: Cost,
        transition: Cost,
        prospect: Prospect,
    ) -> Choice | None:
        resource = prospect.resource
        if resource not in ("flops", "seconds", "dollars", "joules") or not others:
            return None
        counted = "flops" if resource == "flops" else "seconds"  # which the others follow
        options = []
        for other in others:
            takes = self._expected(other, now, measured).of(counted) or 0.0
            v = (measured.of(counted) or 0.0) / max(takes, 1e-30)
            sure = counted == "flops" or other.name in self.measured
            gain = prospect.gain(v, 0.0 if sure else _ERROR * v)
            options.append(Option(other.name, gain, transition, f"{v:.2f} times as many steps"))
        return choose(options, resource=resource, price=prospect.price(transition), z=1.0)
