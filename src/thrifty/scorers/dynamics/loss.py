"""Loss: what a row has to teach, summed over its answer or a token of it.

    score = - sum_t m_t log p(z_t | z_<t)                 ``by: example``
            the same over sum_t m_t                       ``by: token``

The plainest signal of a forward pass. High loss is what is not known yet, and noise.
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
class Loss(Scorer):
    """The loss of the answer, summed or a token: the highest or the lowest first."""

    keep: Literal["high", "low"] = "high"
    by: Literal["token", "example"] = "token"

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "baseline of arXiv:2206.07137"
    worth: ClassVar[Worth] = Worth(
        0.9, 0.8, "the highest losses are noise before they are lessons, arXiv:2206.07137"
    )

    def cost(self, work: Work) -> Cost:
        return scoring_cost(work, work.pool, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        examples = state.tokens(shard)
        found = token_statistics(state.base(), state.shape, examples, meter, _loss)
        values = found.mean if self.by == "token" else found.sums
        return ((1.0 if self.keep == "high" else -1.0) * values).astype(np.float32)[:, None]


def _loss(nll: Any, logits: Any, ids: Any) -> Any:
    """[batch, sequence - 1]"""
    return nll
