"""Facility location: rows that stand for all others (lazy greedy, arXiv:2411.04425 and before).

    f(S) = sum over i of max over j in S of max(0, v_i . v_j) * (1 + balance * s_j)

s_j in 0..1 is a row's rank by score: with ``balance`` 0 only likeness counts. Each step takes the
row with the largest gain a token; f is monotone and submodular, so that greedy is near the best and
a gain once computed is an upper bound later (Minoux 1978). Of more than ``max_rows`` rows the
best-scored are looked at.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, merged_scores, reached
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Picker):
    """Rows that together are near to all rows of the pool."""

    balance: float = 1.0
    """How much a row's score adds to what it stands for."""
    max_rows: int = 8192
    """Rows compared with one another at most, which takes their square in memory and time."""

    source: ClassVar[str] = "arXiv:2411.04425; lazy greedy, Minoux 1978"
    needs_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, balance=(0, inf), max_rows=(1, inf))

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        scores = merged_scores(pool.scores, pool.weights)
        order = best_first(scores, pool.ids, seed)[: self.max_rows]
        pool = pool.where(order)
        if not len(pool):
            return Picked.of(pool.ids)
        rank = 1 - np.arange(len(pool)) / max(len(pool) - 1, 1)
        vectors = pool.vectors().astype(np.float64)
        likeness = np.maximum(vectors @ vectors.T, 0.0) * (1 + self.balance * rank)
        kept = _lazy_greedy(likeness, pool.num_tokens.astype(np.float64), max_tokens)
        return Picked.of(pool.ids[kept])


def _lazy_greedy(
    likeness: NDArray[np.float64], tokens: NDArray[np.float64], max_tokens: float
) -> NDArray[np.int64]:
    """Places in the order taken; ``likeness[i, j]``: how well j stands for i."""
    covered = np.zeros(len(likeness))
    bounds = [(-gain, place) for place, gain in enumerate(likeness.sum(0) / tokens)]
    heapq.heapify(bounds)
    kept: list[int] = []
    used = 0.0
    while bounds:
        _, place = heapq.heappop(bounds)
        if used + tokens[place] > max_tokens:
            continue
        gain = np.maximum(likeness[:, place] - covered, 0).sum() / tokens[place]
        if bounds and (-gain, place) > bounds[0]:
            heapq.heappush(bounds, (-gain, place))
            continue
        kept.append(place)
        used += tokens[place]
        covered = np.maximum(covered, likeness[:, place])
    return np.asarray(kept, dtype=np.int64)
