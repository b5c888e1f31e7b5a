"""Forgetting: rows that are learned and lost again while a model trains (arXiv:1812.05159).

    score = sum over t of max(0, a_t - a_{t+1}),      a_t = share of its tokens that are the argmax

which is the paper's count of correct-to-wrong flips where a_t is 0 or 1. A row that is never right
has its infinity: it scores one for every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Worth
from thrifty.signals.trajectories import Trajectories
from thrifty.signals.trajectory_scorer import TrajectoryScorer


@dataclass(frozen=True, kw_only=True)
class Forgetting(TrajectoryScorer):
    """Rows that a short training run learns and forgets again."""

    source: ClassVar[str] = "arXiv:1812.05159"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "a third of CIFAR-10 is never forgotten and can go, arXiv:1812.05159; text unsure"
    )

    def row_scores(self, found: Trajectories) -> NDArray[np.float64]:
        accuracy = found.of("accuracy")
        flips = np.clip(accuracy[:, :-1] - accuracy[:, 1:], 0, None).sum(1)
        never = accuracy.max(axis=1, initial=0) == 0
        return np.where(np.isnan(accuracy).any(1), np.nan, np.where(never, self.epochs, flips))
