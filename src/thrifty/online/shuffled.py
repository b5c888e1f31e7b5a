"""Passes over all rows, each in another random order: what every trainer does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from thrifty.core.contracts import Chosen, OnlineMethod, Progress, Round


@dataclass(frozen=True, kw_only=True)
class Shuffled(OnlineMethod):
    """Whole passes, each in another random order."""

    source: ClassVar[str] = "the usual baseline"

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        return Round(rows=now.random.permutation(len(chosen)))
