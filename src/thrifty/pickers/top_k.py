"""Top-k within a token budget: the best-scored rows that fit.

With several targets a row's score is the weighted mean of its ranks, so that targets whose scores
differ in scale count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, fill, merged_scores, reached


@dataclass(frozen=True, kw_only=True)
class TopK(Picker):
    """The best-scored rows within the token budget."""

    source: ClassVar[str] = "the usual rule; LESS (arXiv:2402.04333) and others"

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        scores = merged_scores(pool.scores, pool.weights)
        pool = pool.where(best_first(scores, pool.ids, seed))
        return Picked.of(pool.ids[fill(pool.num_tokens, max_tokens)])
