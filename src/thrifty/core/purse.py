"""A purse: what many spend from at the same time, and can never overspend together.

Each holds the most that it can take, then settles for what it took:

    purse = Purse(stage, "serve")              # all that the stage has left, in one lease
    hold = purse.hold(upper)                   # raises BudgetExceeded where it does not fit
    hold.settle(cost)                          # what it took; the rest is free again
    purse.close()                              # one charge

No transaction a request: the lease's counter has what was settled and what is held, so that after
a kill what was under way counts as the most that it can have taken, and as lost; so does what was
settled for something that nobody has kept. Safe between threads.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from thrifty.core.budget import CONSUMED, Cost
from thrifty.core.quantities import FORMATS
from thrifty.core.spending import BudgetExceeded, Stage


class Purse:
    """Holds and settles within what ``stage`` had left when it was opened. ``timed``: the clock's
    seconds are spent too, whoever holds what; otherwise those that are settled."""

    def __init__(self, stage: Stage, activity: str, *, timed: bool = True) -> None:
        self._lease = stage.lease(activity, stage.everything())
        self._lease.timed = timed
        self.left = self._lease.left
        """Of each limited resource, when it was opened or last renewed."""
        self._stage = stage
        self._activity = activity
        self._lock = threading.Lock()
        self._settled = Cost()
        self._kept: Cost | None = None
        self._held: dict[int, Cost] = {}
        self._num_holds = 0

    def __enter__(self) -> Purse:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Where the block raises, what came of it and was not kept is lost."""
        self.close(lost=kind is not None)

    @property
    def spent(self) -> Cost:
        """Settled since it was opened; its seconds are the clock's where it is timed."""
        with self._lock:
            return replace(self._settled, seconds=self._seconds(self._settled))

    @property
    def held(self) -> Cost:
        with self._lock:
            return self._sum_held()

    def remaining(self, resource: str) -> float | None:
        """Of a resource, neither settled nor held; None where it has no limit."""
        if resource not in self.left:
            return None
        with self._lock:
            return self.left[resource] - (self._total(Cost()).of(resource) or 0.0)

    def hold(self, upper: Cost) -> Hold:
        """Set ``upper`` aside. Raises BudgetExceeded where it does not fit what is left."""
        with self._lock:
            total = self._total(upper)
            for name, left in self.left.items():
                amount = total.of(name)
                if amount is None or not amount <= left * (1 + 1e-12):
                    raise BudgetExceeded(self._refusal(name, upper), name)
            self._num_holds += 1
            self._held[self._num_holds] = upper
            self._count()
            return Hold(self, self._num_holds)

    def renew(self) -> Cost:
        """Charge what was settled so far and go on with the rest; what is held stays held. So that
        the ledger of a long service shows what it spent. Returns the charge. Of a purse that is not
        timed; raises BudgetExceeded, and goes on as it is, where more was settled than there
        was."""
        assert not self._lease.timed, "the clock's seconds of a renewed purse are not kept"
        with self._lock:
            charged = self._settled
            self._lease = self._stage.renew(charged, self._sum_held())
            self._settled, self._kept = Cost(), None
            self.left = self._lease.left
            return charged

    def close(self, *, lost: bool = False) -> Cost:
        """Charge it; what is still held counts as the most that it can have taken. ``lost``: all
        that is not kept. Idempotent."""
        with self._lock:
            self._settled += self._sum_held()
            self._held.clear()
            if not self._lease.settled:
                self._count()
            return self._lease.settle(lost=lost)

    def _settle(self, number: int, cost: Cost, kept: bool) -> None:
        with self._lock:
            upper = self._held.pop(number, None)
            if upper is None:  # settled already, or closed meanwhile
                return
            self._settled += cost
            if kept:
                self._kept = (self._kept or Cost()) + cost
                if self._lease.timed:  # the time until now was what it took
                    now = self._lease.used
                    self._kept = replace(self._kept, seconds=now.seconds, joules=now.joules)
            self._count()

    def _sum_held(self) -> Cost:
        return sum(self._held.values(), Cost())

    def _total(self, upper: Cost) -> Cost:
        total = self._settled + self._sum_held() + upper
        return replace(total, seconds=self._seconds(total))

    def _seconds(self, total: Cost) -> float:
        return self._lease.used.seconds if self._lease.timed else total.seconds

    def _count(self) -> None:
        self._lease.count(self._settled + self._sum_held(), self._kept)

    def _refusal(self, resource: str, upper: Cost) -> str:
        show, needs = FORMATS[resource], upper.of(resource)
        if needs is None:
            return (
                f"{self._activity}: its {resource} are not known and the budget limits them\n"
                f"hint: say what it costs, or drop the limit on {resource}"
            )
        free = self.left[resource] - (self._total(Cost()).of(resource) or 0.0)
        return (
            f"{self._activity} may take {show(needs)} but {show(max(free, 0.0))} is left"
            f"{' and not held by others' if self._held else ''}\n"
            f"hint: raise the budget's {resource}, or ask for less at a time"
        )


class Hold:
    """An amount set aside."""

    def __init__(self, purse: Purse, number: int) -> None:
        self._purse = purse
        self._number = number

    def settle(self, cost: Cost, *, kept: bool = True) -> None:
        """What it took in the end, known to be no less; ``kept``: whether what came of it outlives
        this process. Idempotent. Raises ValueError where that is negative or no number."""
        amounts = [cost.of(name) for name in CONSUMED]
        if not all(amount is None or 0 <= amount < float("inf") for amount in amounts):
            raise ValueError(
                f"a cost of {cost!r} cannot be settled\nhint: a cost is what was used, at least 0"
            )
        self._purse._settle(self._number, cost, kept)
