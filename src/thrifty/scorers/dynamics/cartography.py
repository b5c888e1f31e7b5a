"""Dataset cartography: how sure and how steady a model is of a row while it trains
(arXiv:2009.10795).

    mu = mean over t of p_t(y),   sigma = standard deviation over t of p_t(y)
    score = sigma  (``keep: ambiguous``),   mu  (``easy``),   -mu  (``hard``)

p_t(y) is the mean probability of the answer's tokens in epoch t. Ambiguous rows generalise best
where there are enough of them; at small budgets easy ones do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Worth
from thrifty.signals.trajectories import Trajectories
from thrifty.signals.trajectory_scorer import TrajectoryScorer


@dataclass(frozen=True, kw_only=True)
class Cartography(TrajectoryScorer):
    """Ambiguous, easy or hard rows, by how sure a short training run is of them."""

    keep: Literal["ambiguous", "easy", "hard"] = "ambiguous"

    source: ClassVar[str] = "arXiv:2009.10795"
    worth: ClassVar[Worth] = Worth(
        1.1, 0.8, "the most ambiguous third is level with all of it out of domain, arXiv:2009.10795"
    )

    def row_scores(self, found: Trajectories) -> NDArray[np.float64]:
        probability = found.of("probability")
        if self.keep == "ambiguous":
            return probability.std(1)
        return probability.mean(1) * (1.0 if self.keep == "easy" else -1.0)
