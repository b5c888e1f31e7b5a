"""Spending from a ledger: a stage takes leases, a lease counts what it uses until it is settled."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from thrifty.core import quantities
from thrifty.core.budget import Budget, Cost
from thrifty.core.unbroken import unbroken

if TYPE_CHECKING:
    from thrifty.core.counter import Counter
    from thrifty.core.ledger import Ledger
    from thrifty.core.marginal import Choice


class BudgetExceeded(ValueError):
    """A reservation does not fit what is left. ``resource`` names the limit that it would pass."""

    def __init__(self, message: str, resource: str) -> None:
        super().__init__(message)
        self.resource = resource


class Stage:
    """An open stage; spends through leases. ``detail`` (JSON) is kept when it ends."""

    def __init__(self, ledger: Ledger, stage_id: int, account: str, limit: Budget | None) -> None:
        self.ledger = ledger
        self.id = stage_id
        self.account = account
        self.detail: dict[str, Any] = {}
        self._limit = limit
        self._open: Lease | None = None

    @property
    def budget(self) -> Budget:
        """What limits this stage: the run's budget, its share of it, or the limit of its own
        account."""
        if self.account == "budget" and self._limit is None:
            return self.ledger.budget
        return self._limit or Budget()

    def lease(self, activity: str, upper: Cost, *, step: int = 0) -> Lease:
        """Reserve ``upper`` and start its clock. One lease of a stage is open at a time.

        Raises BudgetExceeded, with the resource and what is left, where it does not fit.
        """
        assert self._open is None or self._open.settled, "settle the open lease first"
        left = self.budget.left(self.spent() + self.ledger.reserved(self.account))
        lease_id, counter = self.ledger._reserve(self, activity, upper, step)
        self._open = Lease(self, lease_id, counter, activity, step, left)
        return self._open

    @contextmanager
    def spending(self, activity: str, upper: Cost, *, step: int = 0) -> Iterator[Lease]:
        """A lease for a block; settled at its end. What a block that raises had spent is lost."""
        lease = None
        try:
            with unbroken():
                lease = self.lease(activity, upper, step=step)
            yield lease
        except BaseException:
            if lease is not None:
                with unbroken():
                    lease.settle(lost=True)
            raise
        with unbroken():
            lease.settle()

    def renew(self, charged: Cost, held: Cost) -> Lease:
        """Charge ``charged`` of the open lease, and go on with one on all that is then left, of
        which ``held`` counts as used already. One transaction: a kill finds the one or the other.

        Raises BudgetExceeded, and the lease stays as it was, where more was used than there is.
        """
        before = self._open
        assert before is not None, "there is no open lease"
        counters = self.ledger._counters
        counter = counters.pop(before.id)  # it goes once the charge is committed, not before
        known = set(counters)
        try:
            with self.ledger._journal.transaction():
                self.ledger._settle(before.id, charged, steps=0, lost=False)
                self._open = None
                lease = self.lease(before.activity, self.everything(), step=before.step)
                lease.timed = before.timed
                lease.count(held)
        except BaseException:
            for new in set(counters) - known:
                counters.pop(new).remove()
            counters[before.id] = counter
            self._open = before
            raise
        before._settled = charged
        counter.remove()
        return lease

    def everything(self) -> Cost:
        """What each limited resource of its account has left, open leases taken off."""
        left = self.budget.left(self.spent() + self.ledger.reserved(self.account))
        return Cost.from_dict({name: max(amount, 0.0) for name, amount in left.items()})

    def require(self, cost: Cost, activity: str = "this stage") -> None:
        """Raise BudgetExceeded if ``cost`` does not fit what is left; reserve nothing."""
        cost = self.ledger.rates.of(cost)
        held = self.spent() + self.ledger.reserved(self.account)
        # Memory is given back when a lease ends: what others once held takes nothing from it.
        total = replace(held + cost, peak_memory_bytes=cost.peak_memory_bytes)
        over = self.budget.exceeded_by(total)
        if over is not None:
            raise BudgetExceeded(_refusal(activity, cost, held, self.budget, over), over)

    def spent(self) -> Cost:
        """What the stage's account has spent, other stages included."""
        return self.ledger.spent(account=self.account)

    def roll_back(self, step: int, reason: str) -> Cost:
        """The stage goes on from ``step``: charges past it are lost. Returns what was lost anew."""
        return self.ledger._roll_back(self, step, reason)

    def evaluate(
        self,
        step: int,
        flops: float,
        objective: float,
        stderr: float,
        by_target: Mapping[str, Any],
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a dev evaluation. ``flops``: what its account had spent by then; ``beside``: what
        else was measured, as JSON."""
        self.ledger._evaluated(
            self.id, by_target, beside, step=step, flops=flops, objective=objective, stderr=stderr
        )

    def decide(
        self,
        name: str,
        chosen: str | None,
        reason: str,
        *,
        choice: Choice | None = None,
        detail: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """``Ledger.decide``, of this stage."""
        self.ledger.decide(
            name, chosen, reason, choice=choice, detail=detail, stage_id=self.id, step=step
        )

    def settle_open(self) -> None:
        """Settle the lease that was left open, if one was."""
        if self._open is not None:
            self._open.settle()


class Lease:
    """A reservation being spent. ``used`` is the sum of its ticks; its seconds are the clock's, its
    joules those that the devices counted, where they do."""

    def __init__(
        self,
        stage: Stage,
        lease_id: int,
        counter: Counter,
        activity: str,
        step: int,
        left: Mapping[str, float],
    ) -> None:
        self.stage = stage
        self._left = left
        self.id = lease_id
        self.activity = activity
        self.step = step
        self._counter = counter
        self._start = time.monotonic()
        self._energy = stage.ledger.energy
        self._energy_start = self._energy() if self._energy else 0.0
        self.timed = True
        """Whether its seconds are the clock's; else those that it counts."""
        self._steps = 0
        self._ticked = Cost()
        self._kept: Cost | None = None
        self._settled: Cost | None = None

    @property
    def left(self) -> Mapping[str, float]:
        """Of each limited resource, when it was taken."""
        return self._left

    @property
    def settled(self) -> bool:
        return self._settled is not None

    @property
    def used(self) -> Cost:
        if self._settled is not None:
            return self._settled
        if not self.timed:
            return self._ticked
        used = replace(self._ticked, seconds=time.monotonic() - self._start)
        if self._energy is None:
            return used
        return replace(used, joules=self._energy() - self._energy_start)

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        """Count ``cost`` (its seconds are ignored: the clock knows). Survives the process.

        Work without steps is counted before it is done, and refused with BudgetExceeded where it
        would pass a limit, whatever was predicted; a training step was bounded before it began.
        """
        assert self._settled is None, "a settled lease counts no more"
        total = self._ticked + cost
        if not steps and (cost.flops or cost.tokens):
            self._check(total)
        # Written so that NaN is caught too; a sum that it got into would never pass a limit.
        if not all(0 <= amount < math.inf for amount in _amounts(cost)):
            raise ValueError(
                f"{self.activity} reports a cost that is negative or no number: {cost!r}\n"
                "hint: a cost is what was used, at least zero"
            )
        self._steps += steps
        self._ticked = total
        self._counter.write(self._steps, total, time.monotonic() - self._start, self._kept)

    def count(self, total: Cost, kept: Cost | None = None) -> None:
        """Have ``total`` in place of what was ticked. It may be less than before: what was held for
        something and not used in the end. ``kept``: of it, that whose result is safe by now, and
        which is not lost when the rest is."""
        assert self._settled is None, "a settled lease counts no more"
        self._ticked, self._kept = total, kept
        self._counter.write(self._steps, total, self.used.seconds, kept)

    def _check(self, total: Cost) -> None:
        used = replace(total, seconds=time.monotonic() - self._start)
        for name in ("flops", "tokens", "seconds"):
            amount = used.of(name) or 0.0
            if name in self._left and amount > self._left[name] * (1 + 1e-9):
                show = quantities.FORMATS[name]
                raise BudgetExceeded(
                    f"{self.activity} would take more than the {show(self._left[name])} that was "
                    "left for it\n"
                    f"hint: raise the budget's {name}; the same command then goes on",
                    name,
                )

    def settle(self, *, lost: bool = False) -> Cost:
        """Charge what was used, ``lost`` where its result was thrown away but for what is kept.
        Idempotent."""
        if self._settled is None:
            used = self.used
            self.stage.ledger._settle(self.id, used, steps=self._steps, lost=lost, kept=self._kept)
            self._settled = used
        return self._settled


def _amounts(cost: Cost) -> tuple[float, ...]:
    """What is consumed but for seconds, where it is known."""
    return cost.flops, cost.tokens, cost.joules or 0.0, cost.dollars or 0.0


def _refusal(activity: str, needs: Cost, held: Cost, budget: Budget, over: str) -> str:
    show = quantities.FORMATS[over]
    limit, need, taken = budget.limit(over), needs.of(over), held.of(over)
    assert limit is not None
    if need is None or taken is None:
        what = f"{activity} has" if need is None else "what was spent so far has"
        return (
            f"{what} no known price and the budget limits {over}\n"
            "hint: give the device's price from the start (dollars_per_hour in plan.yaml, or of "
            "BudgetCallback), or drop that limit"
        )
    if over == "peak_memory_bytes":
        enough = show(need * 1.005).replace(" ", "")  # rounded up, so that it does suffice
        return (
            f"{activity} needs {show(need)} but the budget allows {show(limit)}\n"
            f"hint: --memory {enough} or more"
        )
    return (
        f"{activity} needs {show(need)} but {show(max(limit - taken, 0.0))} of {show(limit)} is "
        f"left\nhint: raise the budget's {over}, or plan a smaller run"
    )
