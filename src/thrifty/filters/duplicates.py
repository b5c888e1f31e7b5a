"""Exact duplicates: of rows with the same normalised text the best-scored one survives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Candidates, Filter, Held
from thrifty.core.ordering import best_of_groups


@dataclass(frozen=True, kw_only=True)
class Duplicates(Filter):
    """Drop repeated rows; of each group the best-scored survives."""

    source: ClassVar[str] = "arXiv:2107.06499"

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        rows = candidates.where(_not_alone(candidates.fingerprints))
        return best_of_groups(rows, rows.fingerprints, "duplicate")


def _not_alone(fingerprints: NDArray[np.void]) -> NDArray[np.int64]:
    """Places of those whose first half another one shares: few, and all repeated ones among
    them."""
    halves = fingerprints.view(np.uint64)[::2]
    order = np.argsort(halves, kind="stable")
    same = halves[order[1:]] == halves[order[:-1]]
    shared = np.zeros(len(fingerprints), dtype=bool)
    shared[order[1:][same]] = True
    shared[order[:-1][same]] = True
    return np.flatnonzero(shared)
