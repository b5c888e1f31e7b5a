"""Fewer rows a pass, the gradient as before in expectation (InfoBatch, Qin et al. 2023,
arXiv:2303.04947).

In each pass the rows whose loss, as training saw it last, is below the mean are left out with
probability r, and those of them that stay weigh 1 / (1 - r). The first pass and the last share
delta of the run are whole. What is left out is saved; the losses come from training itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Chosen, OnlineMethod, Progress, Round
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Infobatch(OnlineMethod):
    """Whole passes without a random part of the easy rows, whose rest weighs more."""

    drop: float = 0.5
    """r, the probability that a row below the mean is left out."""
    last: float = 0.125
    """delta, the share of the run at its end that leaves none out."""

    source: ClassVar[str] = "arXiv:2303.04947"
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, drop=(0, 0.99), last=(0, 1))

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        random = now.random
        rows = random.permutation(len(chosen))
        seen = now.losses[~np.isnan(now.losses)]
        if not len(seen) or now.share >= 1 - self.last:
            return Round(rows=rows)
        easy = now.losses[rows] < seen.mean()  # a row not seen yet is not
        out = easy & (random.random(len(rows)) < self.drop)
        weights = np.where(easy, 1 / (1 - self.drop), 1.0).astype(np.float32)
        return Round(
            rows=rows[~out],
            weights=weights[~out],
            left_out=int(chosen.num_tokens[rows[out]].sum()),
        )
