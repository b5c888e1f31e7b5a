"""Embedding similarity, RDS+: rows whose hidden states are near the target's (arXiv:2503.01807).

    score(z, target) = max over v in target of cos( e(z), e(v) )          ``by: max``, or the mean

e is the position-weighted mean of the last hidden states (``signals/embeddings.py``), or what a
sentence-transformers model named as ``model`` makes of the text (``signals/sentence_vectors.py``).
With the pickers ``round_robin`` and ``balanced`` the targets take turns, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.embeddings import embedding_cost, row_vectors
from thrifty.signals.models import locate
from thrifty.signals.sentence_vectors import (
    SentenceModel,
    is_sentence_model,
    sentence_vectors_cost,
)


@dataclass(frozen=True, kw_only=True)
class Embedding(Scorer):
    """Rows whose hidden states are near those of the target's rows."""

    model: str = ""
    """Folder or hub name of the model to embed with, of transformers or sentence-transformers;
    empty: the one to be trained."""
    by: Literal["max", "mean"] = "max"
    max_target_rows: int = 256
    """Target rows compared with, the first so many."""

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "RDS+, arXiv:2503.01807"
    worth: ClassVar[Worth] = Worth(
        2.5,
        1.0,
        "46.4 against 42.2 (10k of 200k), 50.5 against 41.1 (of 5.8M), arXiv:2503.01807",
    )

    def __post_init__(self) -> None:
        check_ranges(self, max_target_rows=(1, inf))

    def cost(self, work: Work) -> Cost:
        total = self._cost(work, work.pool)
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += self._cost(work, target) * share
        return total

    def _cost(self, work: Work, stats: PoolStats) -> Cost:
        if self.model and is_sentence_model(locate(self.model, weights=False)[0]):
            return sentence_vectors_cost(work, stats, self.model)
        return embedding_cost(work, stats, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Models, list[NDArray[np.float32]]]:
        """The model, and each target's vectors [rows, width]."""
        own = models.other(self.model)
        most = self.max_target_rows
        return own, [_vectors(own, rows, meter, most) for rows in targets.values()]

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        own, targets = state
        vectors = _vectors(own, shard, meter)
        columns = []
        for rows in targets:
            near = vectors @ rows.T
            columns.append(near.max(axis=1) if self.by == "max" else near.mean(axis=1))
        return np.stack(columns, axis=1).astype(np.float32)


def _vectors(own: Models, rows: Rows, meter: Meter, most: int | None = None) -> NDArray[np.float32]:
    """[n, width] of the first ``most`` rows, of unit length."""
    if isinstance(own, SentenceModel):
        return own.vectors(rows.texts[:most], meter)
    return row_vectors(own.base(), own.shape, own.tokens(rows)[:most], meter)
