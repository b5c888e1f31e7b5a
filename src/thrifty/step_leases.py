"""Training steps on a stage of the ledger: leased some at a time, booked one by one, and the look
ahead whether more would fit.

A lease stays open between steps, so that logging and saving are on its clock too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from thrifty.affordable import CLOCKED
from thrifty.core.budget import Cost
from thrifty.core.ledger import Lease, Stage
from thrifty.signals.peak_memory import (
    memory_bytes,
    peak_memory_bytes,
    release_free_memory,
    reset_peak,
)
from thrifty.step_cost import StepCost

_LEASE_STEPS = 50
_FIRST_LEASE_STEPS = 4
"""The first lease is short: until a step was timed, its seconds are unknown."""
_NEAR_THE_LIMIT = 0.9
"""Of the memory, from where on it is worth the time to give some back."""


class StepLeases:
    """The leases of ``stage`` for steps that cost ``step_cost`` on ``device``."""

    def __init__(self, stage: Stage, step_cost: StepCost, device: str) -> None:
        self.stage = stage
        self.step_cost = step_cost
        self._device = device
        self._lease: Lease | None = None
        self._num_left = 0
        self._spent_before = Cost()
        self._seconds_booked = 0.0
        reset_peak(device)

    # -- what is spent, and what would fit -------------------------------------------------------

    def priced(self, cost: Cost) -> Cost:
        return self.stage.ledger.rates.of(cost)

    def next_step(self) -> Cost:
        """Upper bound of one step."""
        return self.priced(self.step_cost.upper())

    def spent(self) -> Cost:
        """By the stage's account, what the open lease has used included."""
        if self._lease is None:
            return self.stage.spent()
        return self._spent_before + self.priced(self._lease.used)

    def seconds_since_step(self) -> float:
        """On the open lease's clock, after the last step that was booked on it."""
        return 0.0 if self._lease is None else self._lease.used.seconds - self._seconds_booked

    def exceeded_by(self, upper: Cost) -> str | None:
        """The resource that ``upper`` would exhaust, or None."""
        return self.stage.budget.exceeded_by(self.spent() + upper)

    def exceeded_by_steps(self, steps: int, tail: Cost) -> str | None:
        """The resource that ``steps`` more and ``tail`` would exhaust, or None."""
        return self.exceeded_by(self.priced(self.step_cost.upper(steps)) + tail)

    # -- one lease after the other ---------------------------------------------------------------

    @property
    def holds_a_step(self) -> bool:
        """Whether the next step is leased."""
        return self._lease is not None and self._num_left > 0

    def begin(self, step: int, most: int, tail: Cost) -> None:
        """Lease steps from ``step`` on, at most ``most``, as many as surely fit before ``tail``."""
        self.end()
        self._spent_before = self.stage.spent()
        upper = self.next_step()
        wanted = min(most, _LEASE_STEPS if self.step_cost.is_timed else _FIRST_LEASE_STEPS)
        _, possible = self.stage.budget.binding(self._spent_before + tail, upper)
        self._num_left = max(1, int(min(wanted, possible)))
        bound = self._within_margin(upper * self._num_left)
        self._lease = self.stage.lease("train", bound, step=step)
        self._seconds_booked = 0.0

    def _within_margin(self, upper: Cost) -> Cost:
        """``upper``, or with fewer seconds where the clock went on since the look ahead admitted a
        step (data, logging): that is taken from the step's margin, never from its usual time."""
        over = self.stage.budget.exceeded_by(self._spent_before + upper)
        if over not in CLOCKED:
            return upper
        left, asked = self.stage.budget.left(self._spent_before)[over], upper.of(over) or math.inf
        seconds = upper.seconds * left / asked * (1 - 1e-9)
        if seconds < self.step_cost.mean().seconds:
            return upper
        return self.priced(replace(upper, seconds=seconds, joules=0.0, dollars=0.0))

    def book(self, used: Cost) -> None:
        """Charge a step to the open lease."""
        assert self._lease is not None
        self._lease.tick(used, steps=1)
        self.step_cost.measure(used, self.seconds_since_step())
        self._seconds_booked = self._lease.used.seconds
        self._num_left -= 1

    def lose(self, used: Cost) -> None:
        """Charge what a step took that did not come to its end, with its seconds, as lost."""
        if self._lease is None:
            return
        whole, before, step = self._lease.used, self._seconds_booked, self._lease.step
        self._lease.timed = False
        self._lease.count(_for_seconds(whole, whole, before))
        self.end()
        lost = self.stage.lease("train", Cost(), step=step)  # it is spent, whether it fits or not
        lost.timed = False
        lost.count(_for_seconds(used, whole, whole.seconds - before))
        lost.settle(lost=True)

    def end(self) -> None:
        """Settle what is open; harmless to call again."""
        if self._lease is not None:
            self._note_peak(self._lease)
            self._lease.settle()
            self._lease = None
            self._give_back()

    def _give_back(self) -> None:
        """Near its limit: what a CPU's allocator keeps of freed memory counts as resident, and
        grows by tens of MiB in some runs."""
        limit = self.stage.budget.memory_bytes
        if self._device == "cpu" and limit and memory_bytes("cpu") > _NEAR_THE_LIMIT * limit:
            release_free_memory()

    @contextmanager
    def spending(self, activity: str, upper: Cost, *, step: int) -> Iterator[Lease]:
        """Spend on something else between two steps, on a lease of its own."""
        self.end()
        with self.stage.spending(activity, upper, step=step) as lease:
            yield lease
            self._note_peak(lease)

    def _note_peak(self, lease: Lease) -> None:
        lease.tick(Cost(peak_memory_bytes=peak_memory_bytes(self._device)))


def _for_seconds(used: Cost, whole: Cost, seconds: float) -> Cost:
    """``used`` in so many of the seconds of ``whole``, with their share of its joules."""
    joules = None if whole.joules is None else whole.joules * seconds / max(whole.seconds, 1e-9)
    return replace(used, seconds=seconds, joules=joules)
