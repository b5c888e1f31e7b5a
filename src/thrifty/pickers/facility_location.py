"""Facility location: rows that stand for all others (lazy greedy, arXiv:2411.04425 and before).

    f(S) = sum over i of max over j in S of max(0, k_ij) * (1 + balance * s_j)

    k_ij = v_i . v_j                                                ``over: vectors``
    k_ij = d(y_i, p(. | x_i)) - d(y_i, p(. | x_j, y_j, x_i))        ``over: delift``

The second is what row j as an example in context brings for row i (``signals/delift.py``). s_j in
0..1 is a row's rank by score: with ``balance`` 0 only the kernel counts. Each step takes the row
with the largest gain a token; f is monotone and submodular, so that greedy is near the best and a
gain once computed is an upper bound later (Minoux 1978). Of more than ``max_rows`` rows the
best-scored are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Candidates, Picked, Picker, Work
from thrifty.core.ordering import best_first, merged_scores, reached
from thrifty.core.ranges import check_ranges
from thrifty.signals.delift import pairwise_utility_cost
from thrifty.signals.submodular import lazy_greedy

_MOST_ROWS = {"vectors": 8192, "delift": 128}
"""Their square is paid for: in memory and time, over ``delift`` in forward passes."""


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Picker):
    """Rows that together are near to all rows of the pool."""

    balance: float = 1.0
    """How much a row's score adds to what it stands for."""
    over: Literal["vectors", "delift"] = "vectors"
    """What makes one row stand for another: likeness, or help as an example in context, which takes
    a forward pass a pair."""
    max_rows: int = 0
    """Rows compared with one another at most; 0: 8,192, over ``delift`` 128."""

    source: ClassVar[str] = "arXiv:2411.04425; lazy greedy, Minoux 1978"

    def __post_init__(self) -> None:
        check_ranges(self, balance=(0, inf), max_rows=(0, inf))

    @property
    def needs_vectors(self) -> bool:
        return self.over == "vectors"

    @property
    def needs_pairs(self) -> bool:
        return self.over == "delift"

    @property
    def _most_rows(self) -> int:
        return self.max_rows or _MOST_ROWS[self.over]

    def cost(self, work: Work) -> Cost:
        if self.over == "vectors":
            return Cost()
        return pairwise_utility_cost(work, min(self._most_rows, work.pool.num_examples))

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        scores = merged_scores(pool.scores, pool.weights)
        order = best_first(scores, pool.ids, seed)[: self._most_rows]
        pool = pool.where(order)
        if not len(pool):
            return Picked.of(pool.ids)
        rank = 1 - np.arange(len(pool)) / max(len(pool) - 1, 1)
        kernel = _cosines(pool.vectors()) if self.over == "vectors" else pool.pairwise_utility()
        stands = kernel.astype(np.float64, copy=False)  # in place: it may take half a gigabyte
        np.maximum(stands, 0.0, out=stands)
        stands *= 1 + self.balance * rank
        kept = lazy_greedy(stands, pool.num_tokens.astype(np.float64), max_tokens)
        return Picked.of(pool.ids[kept])


def _cosines(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    return exact @ exact.T
