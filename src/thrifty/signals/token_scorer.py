"""What scorers of one forward pass share: a statistic of every token of the answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work
from thrifty.signals.forward import Sums, scoring_cost, token_statistics


@dataclass(frozen=True, kw_only=True)
class TokenScorer(Scorer):
    """A scorer that sums or averages a statistic over the tokens that carry loss."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"

    @abstractmethod
    def statistic(self, nll: Any, logits: Any, ids: Any) -> Any:
        """[batch, sequence - 1], of what ``token_statistics`` gives."""

    @abstractmethod
    def row_scores(self, found: Sums) -> NDArray[np.float64]:
        """[n], higher = keep."""

    def cost(self, work: Work) -> Cost:
        return scoring_cost(work, work.pool, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        examples = state.tokens(shard)
        found = token_statistics(state.base(), state.shape, examples, meter, self.statistic)
        return self.row_scores(found).astype(np.float32)[:, None]
