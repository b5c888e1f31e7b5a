"""What a training step takes, learnt as steps go by: a bound for the next, a mean for those after.

FLOPs and tokens of the next are bounded by the largest step that can come where that is known,
otherwise by the largest so far; seconds by the slowest of the last few with a margin, since no
clock tells the future. Those after it are taken for no dearer than the last few were, with a margin
where these differ: whether each may start is asked when it comes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from thrifty.core.budget import Cost
from thrifty.costs.time import SECONDS_MARGIN

MEAN_MARGIN = 1.1
"""How much slower than the recent mean several steps together may be."""
HICCUP_SECONDS = 0.05
"""What the machine may always take for something else."""
_RECENT_STEPS = 16


def slower(seconds: float) -> float:
    """What may take as long as something once did."""
    return seconds * SECONDS_MARGIN + HICCUP_SECONDS


class StepCost:
    """A step of a run, as ``predicted`` until one was measured."""

    def __init__(self, predicted: Cost) -> None:
        self._largest = predicted
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._used: deque[Cost] = deque(maxlen=_RECENT_STEPS)

    @property
    def is_known(self) -> bool:
        """Whether a prediction or a step has told its FLOPs."""
        return self._largest.flops > 0

    @property
    def is_timed(self) -> bool:
        return bool(self._seconds)

    def measure(self, used: Cost, seconds: float) -> None:
        """Learn from a step that ``used`` so much and took ``seconds``."""
        self.raise_to(used)
        self._seconds.append(seconds)
        self._used.append(used)

    def raise_to(self, used: Cost) -> None:
        """A step may take the FLOPs and tokens of ``used``."""
        largest = self._largest
        self._largest = replace(
            largest,
            flops=max(largest.flops, used.flops),
            tokens=max(largest.tokens, used.tokens),
        )

    def upper(self, steps: int = 1) -> Cost:
        """Upper bound of the next step, and of more after it as the last few were."""
        slowest = max(self._seconds, default=self._largest.seconds)
        following = self._usual(MEAN_MARGIN)
        return replace(self._largest, seconds=slower(slowest)) + following * (steps - 1)

    def mean(self) -> Cost:
        """Of the last few."""
        return self._usual()

    def _usual(self, margin: float = 1.0) -> Cost:
        """The mean of the last few times ``margin``, no more FLOPs and tokens than the largest."""
        largest, seen = self._largest, self._used or [self._largest]
        return replace(
            largest,
            flops=min(sum(used.flops for used in seen) / len(seen) * margin, largest.flops),
            tokens=min(sum(used.tokens for used in seen) / len(seen) * margin, largest.tokens),
            seconds=self._mean_seconds() * margin,
        )

    def _mean_seconds(self) -> float:
        if not self._seconds:
            return self._largest.seconds
        return sum(self._seconds) / len(self._seconds)
