"""EL2N: the distance of the prediction from the truth (arXiv:2107.07075), a token at a time.

    score = mean over t of | p_t - onehot(y_t) |_2 = sqrt( sum p_t^2 - 2 p_t(y_t) + 1 )

sum p^2 = exp( lse(2 z) - 2 lse(z) ): no error vector of the vocabulary's size is ever made. For
pretraining data it lost to perplexity in arXiv:2309.04564.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.signals.forward import scoring_cost, token_statistics


@dataclass(frozen=True, kw_only=True)
class EL2N(Scorer):
    """How far the prediction is from each token of the answer: the hard rows first."""

    keep: Literal["hard", "easy"] = "hard"

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "arXiv:2107.07075"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "prunes half of CIFAR-10 at no loss; behind perplexity on text, arXiv:2309.04564"
    )

    def cost(self, work: Work) -> Cost:
        return scoring_cost(work, work.pool, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        examples = state.tokens(shard)
        found = token_statistics(state.base(), state.shape, examples, meter, _distance)
        sign = 1.0 if self.keep == "hard" else -1.0
        return (sign * found.mean).astype(np.float32)[:, None]


def _distance(nll: Any, logits: Any, ids: Any) -> Any:
    """[batch, sequence - 1]"""
    squares = ((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)).exp()
    return (squares - 2 * (-nll).exp() + 1).clamp_min(0).sqrt()
