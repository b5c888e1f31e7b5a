"""What a question may take in all its attempts, and has taken."""

from __future__ import annotations

import time
from dataclasses import replace

from thrifty.core.budget import Cost

_CHARGED = ("flops", "tokens", "dollars")
"""By the request; the clock has the seconds."""


class Allowance:
    """Within ``limit``, whose seconds run from now."""

    def __init__(self, limit: Cost) -> None:
        self._limit = limit
        self._started = time.monotonic()
        self._spent = Cost()
        self.num_lost = 0
        """Attempts that may have been computed, and brought nothing."""

    @property
    def spent(self) -> Cost:
        seconds = min(time.monotonic() - self._started, self._limit.seconds)
        return replace(self._spent, seconds=seconds)

    @property
    def seconds_left(self) -> float:
        return self._limit.seconds - self.spent.seconds

    def spend(self, cost: Cost) -> None:
        self._spent += cost

    def lose(self, cost: Cost) -> None:
        self._spent += cost
        self.num_lost += 1

    def fits(self, cost: Cost, wait_seconds: float = 0.0) -> bool:
        """Whether an attempt that takes so much at most can begin after that wait."""
        total = self._spent + cost
        pairs = [(total.of(name), self._limit.of(name)) for name in _CHARGED]
        return wait_seconds < self.seconds_left and all(
            amount is None or most is None or amount <= most * (1 + 1e-9) for amount, most in pairs
        )
