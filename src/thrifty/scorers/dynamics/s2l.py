"""SmallToLarge: an even draw from clusters of the loss trajectories of a small model
(arXiv:2403.07384).

    T_z = [ L(z; theta_1), ..., L(z; theta_T) ],    score = -(rank of z in its cluster of T)

ranks by a random key: the best so many rows hold as many of each cluster, and all of a cluster that
has fewer. Rows with like trajectories have like gradients, of the large model too, so that a draw
from all clusters stands for the pool. No target is needed.
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
from thrifty.core.ordering import random_key
from thrifty.core.ranges import check_ranges
from thrifty.signals.clusters import k_means
from thrifty.signals.trajectories import Trajectories, record, record_cost


@dataclass(frozen=True, kw_only=True)
class S2L(Scorer):
    """An even draw from clusters of the loss trajectories of a short training run."""

    clusters: int = 100
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
    source: ClassVar[str] = "arXiv:2403.07384"
    worth: ClassVar[Worth] = Worth(
        1.8, 1.0, "11% of MathInstruct is level with all of it, arXiv:2403.07384"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            clusters=(1, inf),
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
        losses = found.of("loss")
        known = np.flatnonzero(~np.isnan(losses).any(1))
        cluster = k_means(losses[known], self.clusters, self.seed)
        order = np.lexsort((random_key(found.ids[known], self.seed), cluster))
        starts = np.searchsorted(cluster[order], cluster[order])
        rank = np.empty(len(known))
        rank[order] = np.arange(len(known)) - starts
        scores = np.full(len(losses), np.nan)
        scores[known] = -rank
        return scores
