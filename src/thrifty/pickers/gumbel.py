"""Gumbel top-k: a draw without replacement with probabilities from the scores (arXiv:1903.06059).

    key(z) = score(z) / temperature + g,   g ~ Gumbel(0, 1) by a hash of (seed, id);   the best keys

which draws rows one after another with p(z) ~ exp(score / temperature), as DSIR does from its
importance weights (arXiv:2302.03169). Several targets: a row's key is the best of its targets'.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, fill, random_key, reached
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Gumbel(Picker):
    """A draw of rows, the likelier the higher they score."""

    temperature: float = 1.0
    """Scores are divided by it: small takes the best, large takes anything."""

    source: ClassVar[str] = "arXiv:1903.06059, as in DSIR"

    def __post_init__(self) -> None:
        check_ranges(self, temperature=(1e-9, inf))

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        best = np.nan_to_num(pool.scores.astype(np.float64), nan=-np.inf).max(axis=1, initial=-inf)
        uniform = (random_key(pool.ids, seed).astype(np.float64) + 0.5) / 2.0**64
        uniform = np.clip(uniform, 1e-18, 1 - 1e-16)
        keys = best / self.temperature - np.log(-np.log(uniform))
        pool = pool.where(best_first(keys, pool.ids, seed))
        return Picked.of(pool.ids[fill(pool.num_tokens, max_tokens)])
