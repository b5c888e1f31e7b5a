"""Seen twice: sample until an answer was given twice, five times at most. The two-line rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, vote


@dataclass(frozen=True, kw_only=True)
class SeenTwice(DecodingPolicy):
    """Sample until an answer was given twice; a baseline."""

    times: int = 2
    samples: int = 5
    """At most."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "the usual baseline"

    def __post_init__(self) -> None:
        check_ranges(self, times=(1, math.inf), samples=(1, math.inf))

    def decide(self, asked: Asked, means: Means) -> Action:
        wanted = min(self.samples, means.max_samples)
        most = max(asked.counts.values(), default=0)
        if most >= self.times:
            return vote(asked, f"an answer was given {most} times")
        left = wanted - asked.num_drawn
        if left <= 0:
            return vote(asked, f"{wanted} samples, no answer {self.times} times")
        # Fewer cannot settle it.
        return Draw(model=self.model or means.offers[0].model, count=min(self.times - most, left))
