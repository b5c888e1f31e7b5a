"""EL2N: the distance of the prediction from the truth (arXiv:2107.07075), a token at a time.

    score = mean over t of | p_t - onehot(y_t) |_2 = sqrt( sum p_t^2 - 2 p_t(y_t) + 1 )

sum p^2 = exp( lse(2 z) - 2 lse(z) ): no error vector of the vocabulary's size is ever made. For
pretraining data it lost to perplexity in arXiv:2309.04564.
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
class EL2N(TokenScorer):
    """How far the prediction is from each token of the answer: the hard rows first."""

    keep: Literal["hard", "easy"] = "hard"

    source: ClassVar[str] = "arXiv:2107.07075"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "prunes half of CIFAR-10 at no loss; behind perplexity on text, arXiv:2309.04564"
    )

    def statistic(self, nll: Any, logits: Any, ids: Any) -> Any:
        squares = ((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)).exp()
        return (squares - 2 * (-nll).exp() + 1).clamp_min(0).sqrt()

    def row_scores(self, found: Sums) -> NDArray[np.float64]:
        return found.mean * (1.0 if self.keep == "hard" else -1.0)
