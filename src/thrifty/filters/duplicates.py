"""Exact duplicates: of rows with the same normalised text the best-scored one survives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Candidates, Filter, Held
from thrifty.core.ordering import best_of_groups


@dataclass(frozen=True, kw_only=True)
class Duplicates(Filter):
    """Drop repeated rows; of each group the best-scored survives."""

    source: ClassVar[str] = "arXiv:2107.06499"

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        return best_of_groups(candidates, candidates.fingerprints, "duplicate")
