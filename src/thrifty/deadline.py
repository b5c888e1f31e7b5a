"""The end that Slurm has set for a job, and stopping in time before it.

``SLURM_JOB_END_TIME`` is Unix time. It is turned into a time of the monotonic clock once, when the
command begins, and the clock on the wall is not looked at again: if that jumps on the way, nothing
moves. Where it was wrong when the command began, the end is wrong by as much; the signals that
Slurm sends before it kills are heeded all the same. An end that has passed is that of another job,
left in the environment, or a wrong clock's: it is told and not heeded.

Training looks after every step whether another would be in time (``interruption.py``). All else is
asked to stop ``LEAVING_SECONDS`` before the end, in whatever it is doing: the shard of a scoring
that is under way, the batch of an evaluation, the stage where it has no parts, is done again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from thrifty import stop_signals

VARIABLE = "SLURM_JOB_END_TIME"
LEAVING_SECONDS = 30.0
"""That settling, and the end of a Python process, may take at the most."""
_FAR_SECONDS = 10 * 365 * 86400.0


@dataclass(frozen=True)
class Deadline:
    """``at``: seconds of the monotonic clock; ``shown``: the time of day."""

    at: float
    shown: str

    @property
    def left(self) -> float:
        """Seconds from now."""
        return self.at - time.monotonic()

    def __str__(self) -> str:
        return f"Slurm ends this job at {self.shown}, in {max(self.left, 0.0):.0f} s"


@cache
def of_slurm() -> Deadline | None:
    """None where there is none to heed, or on a rank that follows."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text or int(os.environ.get("RANK", 0)):
        return None
    if not (text.isascii() and text.isdecimal()):
        _say(f"{VARIABLE} is {text[:40]!r}, which is no Unix time: it is not heeded")
        return None
    left = min(float(text) - time.time(), _FAR_SECONDS)
    if left <= 0:
        _say(f"{VARIABLE} passed {-left:,.0f} s ago by this machine's clock: it is not heeded")
        return None
    shown = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
    return Deadline(time.monotonic() + left, shown)


@contextmanager
def kept() -> Iterator[None]:
    """The block is asked to stop in time."""
    deadline = of_slurm()
    if deadline is None:
        yield
        return
    seconds = deadline.left - LEAVING_SECONDS
    timer = threading.Timer(seconds, lambda: stop_signals.ask(str(deadline)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
