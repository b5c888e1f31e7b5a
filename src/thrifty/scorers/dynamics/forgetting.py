"""Forgetting: rows that are learned and lost again while a model trains (arXiv:1812.05159).

    score = sum over t of max(0, a_t - a_{t+1}),      a_t = share of its tokens that are the argmax

which is the paper's count of correct-to-wrong flips where a_t is 0 or 1. A row that is never right
has its infinity: it scores one for every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.trajectories import Trajectories, record, record_cost


@dataclass(frozen=True, kw_only=True)
class Forgetting(Scorer):
    """Rows that a short training run learns and forgets again."""

    model: str = ""
    """Folder or hub name of the model to train, best a small one; empty: the one to be trained."""
    epochs: int = 3
    learning_rate: float = 1e-4
    max_rows: int = 200_000
    """Rows trained on at most, drawn at random; the others are not scored."""
    seed: int = 0

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "training"
    source: ClassVar[str] = "arXiv:1812.05159"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "a third of CIFAR-10 is never forgotten and can go, arXiv:1812.05159; text unsure"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            epochs=(2, inf),
            learning_rate=(0, 1),
            max_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    def cost(self, work: Work) -> Cost:
        return record_cost(work, self.epochs, self.max_rows, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Trajectories, NDArray[np.float64]]:
        """The trajectories and a score for each of their rows."""
        found = record(
            pool,
            models.other(self.model),
            meter,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            max_rows=self.max_rows,
            seed=self.seed,
        )
        return found, self._scores(found)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        trajectories, scores = state
        return trajectories.rows(shard.ids, scores)

    def _scores(self, found: Trajectories) -> NDArray[np.float64]:
        accuracy = found.of("accuracy")
        flips = np.clip(accuracy[:, :-1] - accuracy[:, 1:], 0, None).sum(1)
        never = accuracy.max(axis=1, initial=0) == 0
        return np.where(np.isnan(accuracy).any(1), np.nan, np.where(never, self.epochs, flips))
