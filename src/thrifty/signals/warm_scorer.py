"""What scorers of gradients along a warm-up share: a score is summed over its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work
from thrifty.core.ranges import check_ranges
from thrifty.signals.warm_up import WarmUp, features_cost, warm_up, warm_up_cost


@dataclass(frozen=True, kw_only=True)
class WarmScorer(Scorer):
    """Inner products of rows' directions with the target's mean gradient, over LoRA checkpoints."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    max_warmup_rows: int = 2_000
    """Rows of the pool that the warm-up trains on, drawn at random."""
    epochs: int = 2
    """Of the warm-up; a checkpoint each."""
    learning_rate: float = 1e-3
    rank: int = 8
    dimensions: int = 8192
    max_target_rows: int = 128
    """Target rows whose gradients are averaged, the first so many."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "gradient"
    by_adam: ClassVar[bool]
    """Whether a row counts by Adam's step on it, rather than by its gradient."""
    by_cosine: ClassVar[bool]

    def __post_init__(self) -> None:
        check_ranges(
            self,
            max_warmup_rows=(1, inf),
            epochs=(1, inf),
            learning_rate=(0, 1),
            rank=(1, inf),
            dimensions=(1, inf),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    def cost(self, work: Work) -> Cost:
        total = warm_up_cost(work, self.max_warmup_rows, self.epochs, self.rank, self.model)
        shown = (
            target.part(min(1.0, self.max_target_rows / max(target.num_examples, 1)))
            for target in work.targets.values()
        )
        for stats in (work.pool, *shown):
            total += features_cost(work, stats, self.rank, self.model) * self.epochs
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[WarmUp, Models, list[NDArray[np.float32]]]:
        """The warm-up, its model's tokenizer, and for each checkpoint the targets' mean directions
        [num_targets, num_dimensions]."""
        own = models.other(self.model)
        warm = warm_up(
            pool,
            own,
            meter,
            max_rows=self.max_warmup_rows,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            rank=self.rank,
            num_dimensions=self.dimensions,
            seed=self.seed,
        )
        shown = [own.tokens(target)[: self.max_target_rows] for target in targets.values()]
        directions = []
        for number in range(self.epochs):
            each = [
                warm.features(rows, number, meter, adam=False, unit=self.by_cosine)
                for rows in shown
            ]
            directions.append(np.stack([some.mean(axis=0, dtype=np.float32) for some in each]))
        return warm, own, directions

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        warm, own, directions = state
        examples = own.tokens(shard)
        total = np.zeros((len(shard), len(directions[0])), dtype=np.float32)
        for number, towards in enumerate(directions):
            features = warm.features(
                examples, number, meter, adam=self.by_adam, unit=self.by_cosine
            )
            total += features @ towards.T
        return total / np.float32(len(directions))
