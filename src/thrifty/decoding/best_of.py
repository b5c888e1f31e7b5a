"""Best of n: as many samples for every question, and the one that the reward model likes best.

Rewards say how good a sample is (``Sample.reward``, higher is better). One without a reward, or
with none that is a number, cannot win; the reason tells how many there were. Where no sample has
one the vote decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, best


@dataclass(frozen=True, kw_only=True)
class BestOf(DecodingPolicy):
    """As many samples for every question, and the one of the highest reward."""

    samples: int = 5
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2009.01325"
    needs: ClassVar = "rewards"

    def __post_init__(self) -> None:
        check_ranges(self, samples=(1, math.inf))

    def decide(self, asked: Asked, means: Means) -> Action:
        wanted = min(self.samples, means.max_samples)
        drawn = asked.num_drawn
        if drawn >= wanted:
            return best(asked, f"{wanted} samples, as asked")
        return Draw(model=self.model or means.offers[0].model, count=wanted - drawn)

    def close(self, asked: Asked, means: Means, reason: str) -> Finish:
        return best(asked, reason)
