"""Top-k within a token budget: the best-scored rows that fit.

With several targets a row's score is the weighted mean of its ranks, so that targets whose scores
differ in scale count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, fill


@dataclass(frozen=True, kw_only=True)
class TopK(Picker):
    """The best-scored rows within the token budget."""

    source: ClassVar[str] = "the usual rule; LESS (arXiv:2402.04333) and others"

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(np.flatnonzero(~np.isnan(candidates.scores).all(axis=1)))
        pool = pool.where(best_first(_merged(pool), pool.ids, seed))
        ids = pool.ids[fill(pool.num_tokens, max_tokens)]
        return Picked(ids=ids, weights=np.ones(len(ids), dtype=np.float32))


def _merged(candidates: Candidates) -> NDArray[np.float64]:
    """[n]: the score itself, or the weighted mean rank over targets."""
    scores = np.nan_to_num(candidates.scores.astype(np.float64), nan=-np.inf)
    if scores.shape[1] == 1:
        return scores[:, 0]
    weights = np.asarray(candidates.weights) / np.sum(candidates.weights)
    ranks = [np.unique(column, return_inverse=True)[1] for column in scores.T]
    return np.stack([r / max(r.max(initial=0), 1) for r in ranks], axis=1) @ weights
