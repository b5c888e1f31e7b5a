"""Semantic duplicates: of rows whose vectors nearly coincide the best-scored survives (SemDeDup,
arXiv:2303.09540).

    near where cos( v_i, v_j ) >= 1 - epsilon, of rows in the same k-means cluster

Within clusters all pairs are compared, a block at a time; duplicates across a border between
clusters are missed, as in the paper. Vectors: ``signals/embeddings.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Candidates, Filter, Held
from thrifty.core.ordering import best_of_groups
from thrifty.core.ranges import check_ranges
from thrifty.signals.clusters import connected, k_means

_ROWS_A_CLUSTER = 1000
_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class SemanticDuplicates(Filter):
    """Drop rows that mean nearly what another does; of each group the best-scored survives."""

    epsilon: float = 0.05
    clusters: int = 0
    """0: one for about a thousand rows."""
    seed: int = 0

    source: ClassVar[str] = "SemDeDup, arXiv:2303.09540"
    needs_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, epsilon=(0, 1), clusters=(0, inf), seed=(0, 2**32 - 1))

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        rows = candidates.where(np.argsort(candidates.ids, kind="stable"))
        if not len(rows):
            return {}
        vectors = rows.vectors()
        count = self.clusters or -(-len(rows) // _ROWS_A_CLUSTER)
        cluster = k_means(vectors, count, self.seed)
        pairs = [np.zeros((0, 2), dtype=np.int64)]
        for each in range(count):
            pairs.append(_near(vectors, np.flatnonzero(cluster == each), 1 - self.epsilon))
        groups = connected(np.concatenate(pairs), len(rows))
        return best_of_groups(rows, groups, "semantic duplicate")


def _near(
    vectors: NDArray[np.float32], places: NDArray[np.int64], least: float
) -> NDArray[np.int64]:
    """[pairs, 2] of the places whose cosine is ``least`` or more."""
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(places), _BLOCK):
        block = places[start : start + _BLOCK]
        for other in range(start, len(places), _BLOCK):
            against = places[other : other + _BLOCK]
            one, two = np.nonzero(vectors[block] @ vectors[against].T >= least)
            later = block[one] < against[two]
            found.append(np.stack([block[one[later]], against[two[later]]], axis=1))
    return np.concatenate(found)
