"""Near duplicates by MinHash: of rows that say nearly the same the best-scored survives
(arXiv:2107.06499).

    near where the estimated Jaccard likeness of their sets of word ``shingle``-grams >= threshold

Groups are connected: a near b and b near c keep one of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Filter, Held
from thrifty.core.ordering import best_of_groups
from thrifty.core.ranges import check_ranges
from thrifty.signals.clusters import connected
from thrifty.signals.minhash import near_pairs


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(Filter):
    """Drop rows that are nearly another; of each group the best-scored survives."""

    threshold: float = 0.8
    shingle: int = 5
    """Words of a run that two texts may share."""

    source: ClassVar[str] = "arXiv:2107.06499; MinHash, Broder 1997"

    def __post_init__(self) -> None:
        check_ranges(self, threshold=(0.1, 1), shingle=(1, inf))

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        rows = candidates
        if (np.diff(rows.ids) < 0).any():
            rows = candidates.where(np.argsort(candidates.ids, kind="stable"))
        pairs = near_pairs(rows.texts(), len(rows), self.threshold, self.shingle)
        places, pairs = np.unique(pairs, return_inverse=True)  # of the rows that are near another
        groups = connected(pairs.reshape(-1, 2), len(places))
        return best_of_groups(rows.where(places), groups, "near duplicate")
