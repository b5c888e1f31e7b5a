"""The order in which the rows were picked, kept in every pass: best first, or as a file gives it.

Rows are packed exactly in that order, so that more of a sequence stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Chosen, OnlineMethod, Progress, Round


@dataclass(frozen=True, kw_only=True)
class Ordered(OnlineMethod):
    """Whole passes in the order in which rows were picked."""

    source: ClassVar[str] = "the picker's order"
    keeps_order: ClassVar[bool] = True

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        return Round(rows=np.arange(len(chosen)))
