"""Fixed: as many samples for every question, and the answer given most often (self-consistency)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, vote


@dataclass(frozen=True, kw_only=True)
class Fixed(DecodingPolicy):
    """As many samples for every question, and the answer that most of them give."""

    samples: int = 5
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2203.11171"

    def __post_init__(self) -> None:
        check_ranges(self, samples=(1, math.inf))

    def decide(self, asked: Asked, means: Means) -> Action:
        wanted = min(self.samples, means.max_samples)
        drawn = len(asked.answers()) + asked.failed
        if drawn >= wanted:
            return vote(asked, f"{wanted} samples, as asked")
        return Draw(model=self.model or means.offers[0].model, count=wanted - drawn)
