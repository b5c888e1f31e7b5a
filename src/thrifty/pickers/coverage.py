"""Coverage-centric selection: an even draw over the range of scores, without its hard end (CCS,
arXiv:2210.15809).

    cut the hardest share beta;  split the range of the rest's scores into strata of equal width;
    give every stratum, the smallest first, an equal share of what is left of the budget

and draw at random within a stratum. Higher scores must mean harder (``el2n``, ``loss``,
``forgetting``). Better than the hardest rows where little is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, even_draw, merged_scores, reached
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Coverage(Picker):
    """An even draw over the range of scores, the hardest rows cut off."""

    cut: float = 0.1
    """Share of the rows, those with the highest scores, left out (beta)."""
    strata: int = 50

    source: ClassVar[str] = "CCS, arXiv:2210.15809"

    def __post_init__(self) -> None:
        check_ranges(self, cut=(0, 1), strata=(1, inf))

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        if candidates.num_tokens.sum() <= max_tokens:
            return Picked.of(pool.ids[best_first(np.zeros(len(pool)), pool.ids, seed)])
        scores = merged_scores(pool.scores, pool.weights)
        kept = best_first(scores, pool.ids, seed)[int(self.cut * len(pool)) :]
        pool, scores = pool.where(kept), np.clip(scores[kept], -1e300, 1e300)
        low, width = scores.min(initial=inf), np.ptp(scores) if len(scores) else 0.0
        stratum = np.zeros(len(pool), dtype=np.int64)
        if width > 0:
            share = (scores - low) / width
            stratum = np.minimum((share * self.strata).astype(np.int64), self.strata - 1)
        return Picked.of(pool.ids[even_draw(stratum, pool.num_tokens, pool.ids, max_tokens, seed)])
