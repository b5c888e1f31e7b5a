"""Holding the steps of a run otherwise from here on: another micro-batch, more or less recomputed,
something else trained.

A plan is made before the machine was seen at work; where a step turns out to leave memory over,
less recomputation or a larger micro-batch takes less of what is scarce. Those ways train alike: a
step has the same sequences in the same order, the weights, the optimizer's states and the schedule
are carried over exactly, through a checkpoint; what changes is the order in which sums are rounded.
What is trained changes only where the plan names what else may be (``training_phase.py``): then a
token is worth more or less, and the states begin anew. The transition (a checkpoint, an adapter
merged, loading) is the option's cost.

    seconds = predicted seconds * measured / predicted, of the way at work;   the peak likewise
    v = what a step takes now / then, of the scarce resource;   gain = L(now + R) - L(now + v R)

    v = w then / w now * (steps then - warm-up / 2) / steps now       where what is trained changes

with w the prior worth of a token of what differs, and the steps those that the budget buys and the
schedule has: a cheaper step that is worth less is no gain where no further steps come of it. New
states are warmed up again (``training_phase.py``), which gives half of the warm-up away.

A way that was at work before counts as it was measured, the others within ``_ERROR``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from thrifty.core.budget import Cost
from thrifty.core.contracts import Worth
from thrifty.core.ledger import Stage
from thrifty.core.marginal import Choice, Option, choose
from thrifty.core.plan import Training
from thrifty.core.plan_switch import others_trained, trained_as
from thrifty.core.resolve import parse_spec
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
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
    choosing_flops: float
    """Of a micro-batch, those of an online method that chooses rows in it."""
    evaluation: Cost
    checkpoint: Cost
    shape: ModelShape
    """Of the model as it is trained, an adapter on it included."""
    worths: tuple[tuple[str, Worth], ...] = ()
    """Of each of its techniques the name, and what a token under it is worth."""
    cycle_steps: int = 1
    """After which all that it trains was trained."""

    @property
    def name(self) -> str:
        rows = self.training.per_device_train_batch_size
        times = self.training.gradient_accumulation_steps
        memory = self.training.memory
        activations = parse_spec("activations", memory.activations)[0]
        return f"{parse_spec('trained', memory.trained)[0]} {rows}x{times} {activations}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "per_device_train_batch_size": self.training.per_device_train_batch_size,
            "gradient_accumulation_steps": self.training.gradient_accumulation_steps,
            "activations": self.training.memory.activations,
            "trained": self.training.memory.trained,
        }

    def trains_as(self, other: Holding) -> bool:
        return self.training.memory.trained == other.training.memory.trained

    def worth_against(self, other: Holding) -> tuple[float, float]:
        """Of a token, in tokens under ``other``, and its standard error: what both have in common
        is no matter."""
        pairs = zip(self.worths, other.worths, strict=True)
        differing = [(own[1], its[1]) for own, its in pairs if own != its]
        ratio = math.prod(own.mean / its.mean for own, its in differing)
        errors = [each.stderr / each.mean for pair in differing for each in pair]
        return ratio, ratio * math.hypot(*errors)


def _differing(one: Training, other: Training) -> int:
    """In how many ways their steps are held otherwise."""
    return (
        (one.memory.trained != other.memory.trained)
        + (one.per_device_train_batch_size != other.per_device_train_batch_size)
        + (one.memory.activations != other.memory.activations)
    )


def held_as(training: Training, facts: dict[str, Any]) -> Training:
    """``training``, a plan's, with its steps held as a checkpoint says."""
    training = trained_as(training, facts.get("trained", training.memory.trained))
    memory = replace(training.memory, activations=facts["activations"])
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return replace(training, memory=memory, **{name: facts[name] for name in sizes})


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


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run is, that may be held otherwise."""

    step: int
    now: Holding
    measured: Cost
    """A step as it is, and its peak."""
    schedule_steps: float
    """Still to come by the schedule."""
    budget_steps: float
    """That the budget still buys, as they are."""
    transition: Callable[[Holding], Cost | None]
    """What going over takes; None: the run cannot pay for it."""
    prospect: Prospect | None

    @property
    def steps_left(self) -> float:
        return max(min(self.schedule_steps, self.budget_steps), 0.0)


@dataclass
class MemorySwitch:
    """Weighs, at evaluations, whether to go on otherwise."""

    holding_of: Callable[[Training], Holding]
    """Raises ValueError where techniques refuse one another."""
    plan: Training
    """As the run was planned."""
    memory_limit: float
    """Bytes that the device may hold."""
    most: int = 2
    """Times in a run."""
    measured: dict[str, Cost] = field(default_factory=dict)
    """Name -> a step and its peak, of the ways that were at work."""
    _known: dict[str, Holding | None] = field(default_factory=dict)

    @property
    def remembered(self) -> dict[str, Any]:
        """What a checkpoint keeps of what was measured."""
        return {name: cost.to_dict() for name, cost in self.measured.items()}

    def recall(self, remembered: dict[str, Any]) -> None:
        """Go on with what was measured when a checkpoint was left."""
        self.measured = {name: Cost.from_dict(each) for name, each in remembered.items()}

    def consider(self, standing: Standing, stage: Stage) -> Holding | None:
        """The way to go on; None: as it is."""
        now, measured = standing.now, standing.measured
        self.measured[now.name] = measured
        if standing.prospect is None or not measured.peak_memory_bytes:
            return None
        if len(switches(stage, standing.step)) >= self.most:
            return None
        others = {other.name: other for other in self._others(now, measured)}
        choice = self._weigh(list(others.values()), standing, standing.prospect)
        if choice is None:
            return None
        chosen = None if choice.chosen is None else others[choice.chosen]
        reason = choice.reason
        if chosen is not None and not chosen.trains_as(now):
            reason += f"; {new_states(now, chosen)}"
        stage.decide(DECISION, choice.chosen or STAY, reason, choice=choice, step=standing.step)
        return chosen

    def ways(self) -> Iterator[Training]:
        """The run's steps, of everything that may be trained, each once."""
        yield self.plan
        for trained in others_trained(self.plan):
            yield trained_as(self.plan, trained)

    def _others(self, now: Holding, measured: Cost) -> Iterator[Holding]:
        """Those that fit, as far as can be told from what the one at work takes; those that differ
        less from it come first, for of equals the first is taken."""
        every = (each for way in self.ways() for each in alike(way))
        for training in sorted(every, key=partial(_differing, now.training)):
            other = self._priced(training)
            if other is None or other.name == now.name:
                continue
            if self._expected(other, now, measured).peak_memory_bytes <= self.memory_limit:
                yield other

    def _priced(self, training: Training) -> Holding | None:
        """None where its techniques refuse one another. Once a run: what it takes to work out is
        milliseconds, of dozens of ways."""
        key = repr(training)
        if key not in self._known:
            try:
                self._known[key] = self.holding_of(training)
            except ValueError:
                self._known[key] = None
        return self._known[key]

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
        self, others: Sequence[Holding], standing: Standing, prospect: Prospect
    ) -> Choice | None:
        resource, now, measured = prospect.resource, standing.now, standing.measured
        if resource not in ("flops", "seconds", "dollars", "joules"):
            return None
        counted = "flops" if resource == "flops" else "seconds"  # which the others follow
        options, dearest = [], Cost()
        for other in others:
            transition = standing.transition(other)
            if transition is None:
                continue
            takes = self._expected(other, now, measured).of(counted) or 0.0
            cheaper = (measured.of(counted) or 0.0) / max(takes, 1e-30)
            error = 0.0 if counted == "flops" or other.name in self.measured else _ERROR
            v, note = cheaper, f"{cheaper:.2f} times as many steps"
            if not other.trains_as(now):
                found = self._as_tokens(other, standing, cheaper)
                if found is None:
                    continue
                v, uncertain, note = found
                error = math.hypot(error, uncertain)
            options.append(Option(other.name, prospect.gain(v, error * v), transition, note))
            dearest = max(dearest, transition, key=lambda cost: cost.of(resource) or 0.0)
        if not options:
            return None
        return choose(options, resource=resource, price=prospect.price(dearest), z=1.0)

    def _as_tokens(
        self, other: Holding, standing: Standing, cheaper: float
    ) -> tuple[float, float, str] | None:
        """Of another thing trained: how many times as much the tokens to come are worth, the
        relative error of that, and in words; None where it would not come round once."""
        steps = min(cheaper * standing.budget_steps, standing.schedule_steps)
        if steps < other.cycle_steps:
            return None
        worth, error = other.worth_against(standing.now)
        useful = max(steps - lost_steps(other.training), 0.0)
        note = (
            f"{steps:,.0f} steps where there are {standing.steps_left:,.0f}, "
            f"a token worth {worth:.2f} ± {error:.2f} of one now, states begun anew"
        )
        return worth * useful / max(standing.steps_left, 1e-9), error / worth, note


def switches(stage: Stage, before: int) -> list[int]:
    """The steps, before that one, at which a run went over to another way: by the ledger, so that
    a run that resumes counts the same. What a rollback undid was decided again since."""
    decided = {
        row["step"]: row["chosen"]
        for row in stage.ledger.decisions()
        if row["stage_id"] == stage.id and row["name"] == DECISION and row["step"] < before
    }
    return sorted(step for step, chosen in decided.items() if chosen != STAY)


def lost_steps(training: Training) -> float:
    """That a linear warm-up gives away, its mean rate being half of the full one."""
    return max(training.warmup_steps - 1, 0) / 2


def new_states(now: Holding, then: Holding) -> str:
    """What is carried over where what is trained changes, in words."""
    rates, warmup = [each.training.learning_rate for each in (now, then)], now.training.warmup_steps
    merged = f", the adapter merged in {now.setting.dtype}" if now.setting.adapter else ""
    rounded = ", which rounds each weight once" if merged and now.setting.dtype != "float32" else ""
    rise = f", warmed up over {warmup:,} steps" if warmup else ""
    return (
        f"the weights are carried over{merged}{rounded}; the schedule goes on; the optimizer's "
        f"states begin anew{rise}; the learning rate goes from {rates[0]:.3g} to {rates[1]:.3g}"
    )
