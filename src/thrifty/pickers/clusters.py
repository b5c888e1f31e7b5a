"""Clusters: an even draw over k-means clusters of the rows' vectors, the best-scored first.

    c = k-means(v),   then the clusters take turns by their tokens, each its best remaining row

as ClusterClip and the diversity half of data selection do (arXiv:2402.14526; D4, arXiv:2308.12284).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import even_draw, merged_scores, reached
from thrifty.core.ranges import check_ranges
from thrifty.signals.clusters import k_means


@dataclass(frozen=True, kw_only=True)
class Clusters(Picker):
    """An even draw over clusters of like rows, the best-scored of each first."""

    clusters: int = 100

    source: ClassVar[str] = "arXiv:2402.14526"

    def __post_init__(self) -> None:
        check_ranges(self, clusters=(1, inf))

    @property
    def needs_vectors(self) -> bool:
        return True

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        pool = pool.where(np.argsort(pool.ids, kind="stable"))
        if not len(pool):
            return Picked.of(pool.ids)
        cluster = k_means(pool.vectors(), self.clusters, seed)
        scores = merged_scores(pool.scores, pool.weights)
        order = even_draw(cluster, pool.num_tokens, pool.ids, max_tokens, seed, scores=scores)
        return Picked.of(pool.ids[order])
