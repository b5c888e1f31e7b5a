"""Band: rows whose scores lie about a quantile, neither the best nor the worst.

    order by | rank(z) / (n - 1) - center |

Of a loss the middle is what arXiv:2309.04564 keeps; of a score of hardness a band below the top
leaves out the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first, fill, merged_scores, reached
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Band(Picker):
    """Rows whose scores are nearest to a quantile of the pool's."""

    center: float = 0.5
    """0 is the lowest score, 1 the highest."""

    source: ClassVar[str] = "the middle band of arXiv:2309.04564"

    def __post_init__(self) -> None:
        check_ranges(self, center=(0, 1))

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(reached(candidates.scores))
        worst_first = best_first(-merged_scores(pool.scores, pool.weights), pool.ids, seed)
        place = np.empty(len(pool))
        place[worst_first] = np.arange(len(pool)) / max(len(pool) - 1, 1)
        pool = pool.where(best_first(-np.abs(place - self.center), pool.ids, seed))
        return Picked.of(pool.ids[fill(pool.num_tokens, max_tokens)])
