"""What scorers of trajectories share: a short training run, and a score for each of its rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work
from thrifty.core.ranges import check_ranges
from thrifty.signals.trajectories import Trajectories, record, record_cost


@dataclass(frozen=True, kw_only=True)
class TrajectoryScorer(Scorer):
    """A scorer that says what a row's trajectory is worth."""

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

    def __post_init__(self) -> None:
        check_ranges(
            self,
            epochs=(2, inf),
            learning_rate=(0, 1),
            max_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    @abstractmethod
    def row_scores(self, found: Trajectories) -> NDArray[np.float64]:
        """[n] of the rows trained on, in their order; NaN = no score."""

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
        return found, self.row_scores(found)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        trajectories, scores = state
        return trajectories.rows(shard.ids, scores)
