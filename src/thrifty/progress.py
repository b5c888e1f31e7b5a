"""Lines that say how far something slow has come: the first after some seconds, then ever rarer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

FIRST_SECONDS = 3.0
RARER = 0.2
"""Of the time that has passed, the least until the next line: hours of work make few lines."""

T = TypeVar("T")


class Pace:
    """When the next line is due."""

    def __init__(self, first: float = FIRST_SECONDS, rarer: float = RARER) -> None:
        self._first = first
        self._rarer = rarer
        self.begin()

    def begin(self) -> None:
        self._began = self._last = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Whether it is time for a line, which then counts as said."""
        now = time.monotonic()
        if now - self._last < max(self._first, self._rarer * (now - self._began)):
            return False
        self._last = now
        return True

    def said(self) -> None:
        """Something else was said: no line for a while."""
        self._last = time.monotonic()


def counted(rows: Iterable[T], say: Callable[[str], None]) -> Iterator[T]:
    """The rows, with a line now and then about how many have gone by."""
    pace = Pace()
    number = 0
    for number, row in enumerate(rows, 1):
        yield row
        if number % 64 == 0 and pace.due():
            say(f"  {number:,} rows read and tokenised, {number / pace.elapsed:,.0f} a second")
