"""Embedding similarity, RDS+: rows whose hidden states are near the target's (arXiv:2503.01807).

    score(z, target) = max over v in target of cos( e(z), e(v) )          ``by: max``, or the mean

e is the position-weighted mean of the last hidden states (``signals/embeddings.py``). With the
pickers ``round_robin`` and ``balanced`` the targets take turns, as in the paper.
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
from thrifty.signals.embeddings import embedding_cost, row_vectors


@dataclass(frozen=True, kw_only=True)
class Embedding(Scorer):
    """Rows whose hidden states are near those of the target's rows."""

    model: str = ""
    """Folder or hub name of the model to embed with; empty: the one to be trained."""
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
        total = embedding_cost(work, work.pool, self.model)
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += embedding_cost(work, target, self.model) * share
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Models, list[NDArray[np.float32]]]:
        """The model, and each target's vectors [rows, width]."""
        own = models.other(self.model)
        asked = [own.tokens(rows)[: self.max_target_rows] for rows in targets.values()]
        return own, [row_vectors(own.base(), own.shape, rows, meter) for rows in asked]

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        own, targets = state
        vectors = row_vectors(own.base(), own.shape, own.tokens(shard), meter)
        columns = []
        for rows in targets:
            near = vectors @ rows.T
            columns.append(near.max(axis=1) if self.by == "max" else near.mean(axis=1))
        return np.stack(columns, axis=1).astype(np.float32)
