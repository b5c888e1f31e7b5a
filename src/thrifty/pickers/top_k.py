"""Top-k within a token budget: the best-scored rows that fit.

With several targets a row's score is the weighted mean of its ranks, so that targets whose scores
differ in scale count alike; or its best rank (``by: max``), as LESS takes the best of sub-tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, fill, merged_scores, reached


@dataclass(frozen=True, kw_only=True)
class TopK(Picker):
    """The best-scored rows within the token budget."""

    by: Literal["mean", "max"] = "mean"
    """Over targets: rows that serve all of them, or any."""

    source: ClassVar[str] = "the usual rule; LESS (arXiv:2402.04333) and others"

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        # Places in the candidates rather than copies of them: there may be ten million.
        places = reached(candidates.scores)
        scores = merged_scores(candidates.scores[places], candidates.weights, by=self.by)
        order = places[best_first(scores, candidates.ids[places], seed)]
        return Picked.of(candidates.ids[order[fill(candidates.num_tokens[order], max_tokens)]])
