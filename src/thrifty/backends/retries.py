"""Trying again: when, how often, for how long.

After attempt k it is waited for

    wait = told + u 2^(k - 1) first,   u ~ uniform(1/2, 1),   at most ``longest``

where ``told`` is what the server asked for. Chance spreads those who failed at the same moment;
it comes from a seed, so that tests repeat.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from thrifty.backends.allowance import Allowance
from thrifty.core.budget import Cost
from thrifty.core.ranges import check_ranges

T = TypeVar("T")


class AttemptFailed(Exception):
    """One attempt brought nothing."""

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        again: bool = False,
        computed: bool = False,
        fatal: bool = False,
        unreached: bool = False,
        told_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.again = again
        """Another one may go well."""
        self.computed = computed
        """It may have been answered, and paid for, though nothing of it came."""
        self.fatal = fatal
        """Whatever else is asked fails alike."""
        self.unreached = unreached
        """Nobody was there."""
        self.told_seconds = told_seconds
        """How long the server wants to be left alone."""
        self.attempts = 1
        """With those before it."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How patient to be."""

    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0
    total_seconds: float = 1800.0
    """For all attempts of a question and the waits between them."""
    lost: int = 1
    """Attempts of a question that may have been computed and brought nothing, before it is given
    up: what is held for it is so many times more."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            attempts=(1, 1000),
            first_wait_seconds=(0, 3600),
            longest_wait_seconds=(0, 3600),
            total_seconds=(1e-3, 1e7),
            lost=(0, 1000),
        )

    def wait_seconds(self, attempt: int, told_seconds: float, random: Random) -> float:
        """After that attempt, the first being 1."""
        usual = random.uniform(0.5, 1.0) * math.ldexp(self.first_wait_seconds, attempt - 1)
        return min(told_seconds + usual, self.longest_wait_seconds)


async def tried(
    attempt: Callable[[], Awaitable[T]],
    most: Cost,
    allowance: Allowance,
    retries: Retries,
    random: Random,
) -> T:
    """What ``attempt`` returns, which takes ``most`` at most. Those that may have been computed and
    brought nothing are lost from ``allowance``; none is begun that does not fit it. Raises the last
    AttemptFailed."""
    for number in range(1, retries.attempts + 1):
        try:
            return await attempt()
        except AttemptFailed as failed:
            failed.attempts = number
            if failed.computed:
                allowance.lose(most)
            wait = retries.wait_seconds(number, failed.told_seconds, random)
            last = number == retries.attempts or not allowance.fits(most, wait)
            if last or not failed.again:
                raise
        await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
