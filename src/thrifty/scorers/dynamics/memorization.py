"""Memorisation: which share of the answer the model would have written itself.

    score = - mean over t of [ argmax p(. | z_<t) = z_t ]

The teacher-forced form of the share of a suffix that greedy decoding reproduces (arXiv:2304.11158,
as a pruning score arXiv:2309.04564): one pass instead of a generation, and an upper bound of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Worth
from thrifty.signals.forward import Sums
from thrifty.signals.token_scorer import TokenScorer


@dataclass(frozen=True, kw_only=True)
class Memorization(TokenScorer):
    """How little of the answer the model would have written itself."""

    keep: Literal["new", "known"] = "new"

    source: ClassVar[str] = "arXiv:2304.11158; as a score arXiv:2309.04564"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "near random as a pruning score of pretraining data, arXiv:2309.04564"
    )

    def statistic(self, nll: Any, logits: Any, ids: Any) -> Any:
        return logits.argmax(-1) == ids

    def row_scores(self, found: Sums) -> NDArray[np.float64]:
        return found.mean * (-1.0 if self.keep == "new" else 1.0)
