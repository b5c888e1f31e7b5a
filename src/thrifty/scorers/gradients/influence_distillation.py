"""Influence distillation: gradient scores of a few landmarks, carried to all rows by what a forward
pass says of them (arXiv:2505.19051).

    p_l = LESS's score of landmark l,      p(z) = mean p + sum over l of  k(v(z), v(l)) a_l

a is the kernel ridge regression of p on the landmarks' vectors, k a Gaussian as wide as the median
distance of two of them, as in the authors' code. The paper's vectors are derivatives of the first
layers' outputs along random directions, a pass or more for each row on its own; here they are the
position-weighted mean hidden states of RDS+, one forward of a batch. The damping is chosen by
leaving one out. Landmarks keep their own scores, which are paid for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ordering import random_key
from thrifty.core.ranges import check_ranges
from thrifty.core.resolve import resolve
from thrifty.signals.embeddings import embedding_cost, row_vectors
from thrifty.signals.kernel_ridge import gaussian_kernel, median_width, ridge_coefficients
from thrifty.signals.some_rows import SomePool, SomeRows


@dataclass(frozen=True, kw_only=True)
class InfluenceDistillation(Scorer):
    """LESS's scores of a few landmark rows, carried to all by their hidden states."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    landmarks: int = 1024
    """Rows of the pool whose gradients are made, drawn at random; the warm-up trains on as many."""
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
    source: ClassVar[str] = "arXiv:2505.19051"
    worth: ClassVar[Worth] = Worth(
        3.0, 2.0, "level with LESS at up to 3.5 times its speed, arXiv:2505.19051"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            landmarks=(2, inf),
            epochs=(1, inf),
            learning_rate=(0, 1),
            rank=(1, inf),
            dimensions=(1, inf),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 2),
        )

    def _exact(self) -> Scorer:
        """What scores the landmarks."""
        options = {
            "model": self.model,
            "max_warmup_rows": self.landmarks,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "rank": self.rank,
            "dimensions": self.dimensions,
            "max_target_rows": self.max_target_rows,
            "seed": self.seed,
        }
        exact: Scorer = resolve("scorer", {"less": options})
        return exact

    def cost(self, work: Work) -> Cost:
        share = min(1.0, self.landmarks / max(work.pool.num_examples, 1))
        total = self._exact().cost(replace(work, pool=work.pool.part(share)))
        if share < 1.0:
            total += embedding_cost(work, work.pool, self.model)
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> _Landmarks:
        own, exact = models.other(self.model), self._exact()
        everyone = np.concatenate([shard.ids for shard in pool.shards()])
        # Other rows than those of the warm-up, which are drawn under the seed itself.
        drawn = np.argsort(random_key(everyone, self.seed + 1), kind="stable")[: self.landmarks]
        ids = np.sort(everyone[drawn])
        state = exact.prepare(pool, targets, models, meter)
        alone = len(ids) == len(everyone)
        scores, vectors, found = [], [], []
        for rows in SomePool(pool, ids).shards():
            found.append(rows.ids)
            scores.append(exact.score(rows, state, meter))
            if not alone:
                vectors.append(row_vectors(own.base(), own.shape, own.tokens(rows), meter))
        order = np.argsort(np.concatenate(found))
        known = np.concatenate(scores)[order]
        if alone:
            return _Landmarks(own, ids, known)
        shown = np.concatenate(vectors)[order]
        width = median_width(shown)
        centred = known.astype(np.float64) - known.mean(axis=0, dtype=np.float64)
        kernel = gaussian_kernel(shown, shown, width)
        return _Landmarks(own, ids, known, shown, width, ridge_coefficients(kernel, centred))

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        places = np.minimum(np.searchsorted(state.ids, shard.ids), len(state.ids) - 1)
        is_landmark = state.ids[places] == shard.ids
        scores: NDArray[np.float32] = state.scores[places]
        others = np.flatnonzero(~is_landmark)
        if len(others):
            own, rows = state.models, SomeRows(shard, others)
            vectors = row_vectors(own.base(), own.shape, own.tokens(rows), meter)
            near = gaussian_kernel(vectors, state.vectors, state.width)
            scores[others] = state.scores.mean(axis=0) + near @ state.coefficients
        return scores


class _Landmarks(NamedTuple):
    models: Models
    ids: NDArray[np.int64]  # [n], sorted
    scores: NDArray[np.float32]  # [n, num_targets]
    vectors: Any = None  # [n, width]; None where every row is a landmark
    width: float = 1.0
    coefficients: Any = None  # [n, num_targets]
