"""Threshold: no row below a score, whatever the token budget would still hold.

    keep z where score(z) >= least,   best first

``least`` is a number, or a share of the pool's scores (``quantile``). Where scores are gains a
token, the shadow price of a token is the threshold of the one rule: a row that brings less is not
worth its tokens (arXiv:2606.10706).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, fill, merged_scores, reached
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Threshold(Picker):
    """The best-scored rows down to a score, and no further."""

    least: str = ""
    """The lowest score to keep, a number; empty: ``quantile`` decides."""
    quantile: float = 0.0
    """Of the pool's scores, that has to be reached."""

    source: ClassVar[str] = "the threshold rule of arXiv:2606.10706"

    def __post_init__(self) -> None:
        check_ranges(self, quantile=(0, 1))
        if self.least:
            try:
                float(self.least)
            except ValueError:
                raise ValueError(
                    f"least must be a number, not {self.least!r}\nhint: least: 0.5"
                ) from None

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        scores = merged_scores(pool.scores, pool.weights)
        if len(pool):
            least = float(self.least) if self.least else np.quantile(scores, self.quantile)
            pool, scores = pool.where(scores >= least), scores[scores >= least]
        pool = pool.where(best_first(scores, pool.ids, seed))
        return Picked.of(pool.ids[fill(pool.num_tokens, max_tokens)])
