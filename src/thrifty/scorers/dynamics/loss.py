"""Loss: what a row has to teach, summed over its answer or a token of it.

    score = - sum_t m_t log p(z_t | z_<t)                 ``by: example``
            the same over sum_t m_t                       ``by: token``

The plainest signal of a forward pass. High loss is what is not known yet, and noise.
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
class Loss(TokenScorer):
    """The loss of the answer, summed or a token: the highest or the lowest first."""

    keep: Literal["high", "low"] = "high"
    by: Literal["token", "example"] = "token"

    source: ClassVar[str] = "baseline of arXiv:2206.07137"
    worth: ClassVar[Worth] = Worth(
        0.9, 0.8, "the highest losses are noise before they are lessons, arXiv:2206.07137"
    )

    def statistic(self, nll: Any, logits: Any, ids: Any) -> Any:
        return nll

    def row_scores(self, found: Sums) -> NDArray[np.float64]:
        values = found.mean if self.by == "token" else found.sums
        return values * (1.0 if self.keep == "high" else -1.0)
