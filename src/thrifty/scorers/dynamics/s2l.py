"""SmallToLarge: an even draw from clusters of the loss trajectories of a small model
(arXiv:2403.07384).

    T_z = [ L(z; theta_1), ..., L(z; theta_T) ],    score = -(rank of z in its cluster of T)

ranks by a random key: the best so many rows hold as many of each cluster, and all of a cluster that
has fewer. Rows with like trajectories have like gradients, of the large model too, so that a draw
from all clusters stands for the pool. No target is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Worth
from thrifty.core.ordering import random_key
from thrifty.core.ranges import check_ranges
from thrifty.signals.clusters import k_means
from thrifty.signals.trajectories import Trajectories
from thrifty.signals.trajectory_scorer import TrajectoryScorer


@dataclass(frozen=True, kw_only=True)
class S2L(TrajectoryScorer):
    """An even draw from clusters of the loss trajectories of a short training run."""

    clusters: int = 100

    source: ClassVar[str] = "arXiv:2403.07384"
    worth: ClassVar[Worth] = Worth(
        1.8, 1.0, "11% of MathInstruct is level with all of it, arXiv:2403.07384"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, clusters=(1, inf))

    def row_scores(self, found: Trajectories) -> NDArray[np.float64]:
        losses = found.of("loss")
        known = np.flatnonzero(~np.isnan(losses).any(1))
        cluster = k_means(losses[known], self.clusters, self.seed)
        order = np.lexsort((random_key(found.ids[known], self.seed), cluster))
        starts = np.searchsorted(cluster[order], cluster[order])
        rank = np.empty(len(known))
        rank[order] = np.arange(len(known)) - starts
        scores = np.full(len(losses), np.nan)
        scores[known] = -rank
        return scores
