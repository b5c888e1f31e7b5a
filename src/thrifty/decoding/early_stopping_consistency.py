"""Early-stopping self-consistency: samples come in windows; one whose answers all agree ends it.

The answer is the vote over all samples so far (arXiv:2401.10480). A window with a sample in which
no answer could be read does not agree. A draw that failed is no part of a window, but counts
towards what may be drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, vote


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConsistency(DecodingPolicy):
    """Windows of samples, until all answers of one agree."""

    window: int = 5
    samples: int = 40
    """At most."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2401.10480"

    def __post_init__(self) -> None:
        check_ranges(self, window=(2, math.inf), samples=(1, math.inf))

    def decide(self, asked: Asked, means: Means) -> Action:
        answers = [sample.answer for sample in asked.answers()]
        for start in range(0, len(answers) - self.window + 1, self.window):
            if answers[start] is not None and len({*answers[start : start + self.window]}) == 1:
                return vote(asked, f"all {self.window} answers of a window agree")
        wanted = min(self.samples, means.max_samples)
        left = wanted - len(answers) - asked.failed
        if left <= 0:
            return vote(asked, f"{wanted} samples, no window of {self.window} agrees")
        missing = self.window - len(answers) % self.window
        return Draw(model=self.model or means.offers[0].model, count=min(missing, left))
