"""Area under the margin: mislabelled rows stand against what the model learns elsewhere
(arXiv:2001.10528).

    score = mean over t of M_t,    M_t = mean over its tokens of z_t(y) - max over k != y of z_t(k)

Low = the model keeps preferring something else: a wrong answer, or noise.
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
class AUM(TrajectoryScorer):
    """Rows whose answer a short training run agrees with; wrong ones come last."""

    keep: Literal["clean", "noisy"] = "clean"

    source: ClassVar[str] = "arXiv:2001.10528"
    worth: ClassVar[Worth] = Worth(
        1.1, 0.6, "finds mislabelled rows, 17% fewer errors on WebVision50, arXiv:2001.10528"
    )

    def row_scores(self, found: Trajectories) -> NDArray[np.float64]:
        return found.of("margin").mean(1) * (1.0 if self.keep == "clean" else -1.0)
