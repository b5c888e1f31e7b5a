"""Exact duplicates: of rows with the same normalised text the best-scored one survives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Filter, Held


@dataclass(frozen=True, kw_only=True)
class Duplicates(Filter):
    """Drop repeated rows; of each group the best-scored survives."""

    source: ClassVar[str] = "arXiv:2107.06499"

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        best = np.nan_to_num(candidates.scores, nan=-np.inf).max(axis=1, initial=-np.inf)
        # Groups by fingerprint, in each the best first and of equals the lowest id.
        order = np.lexsort((candidates.ids, -best, candidates.fingerprints))
        prints = candidates.fingerprints[order]
        ids = candidates.ids[order].tolist()
        dropped, keeper = {}, -1
        for place, row in enumerate(ids):
            if place == 0 or prints[place] != prints[place - 1]:
                keeper = row
            else:
                dropped[row] = f"duplicate of row {keeper}"
        return dropped
