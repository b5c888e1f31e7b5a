"""DSIR: importance weights from hashed n-grams (arXiv:2302.03169).

    score(z, target) = log p_target(z) - log p_pool(z) = sum_b c_b(z) log( q_b / p_b )

c are the row's counts of hashed 1- and 2-grams, q and p the target's and the pool's shares of each
bucket, one added to every count. The picker ``gumbel`` draws from the weights as the paper does.
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
from thrifty.signals.ngrams import hashed_ngrams, ngrams_cost


@dataclass(frozen=True, kw_only=True)
class DSIR(Scorer):
    """Rows whose words and pairs of words are the target's rather than the pool's; no model."""

    buckets: int = 10_000
    by: Literal["row", "word"] = "row"
    """The weight of a row as in the paper, or a mean over its n-grams, which favours no length."""

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued", "preference")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "text"
    source: ClassVar[str] = "arXiv:2302.03169"
    worth: ClassVar[Worth] = Worth(
        2.0, 1.0, "2% above random on GLUE after pretraining on the choice, arXiv:2302.03169"
    )

    def __post_init__(self) -> None:
        check_ranges(self, buckets=(2, inf))

    def cost(self, work: Work) -> Cost:
        return ngrams_cost(work, passes=2)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> NDArray[np.float64]:
        """[buckets, num_targets]: log q_b / p_b."""
        raw = np.ones(self.buckets)
        for shard in pool.shards():
            raw += hashed_ngrams(shard.texts, self.buckets).sum(axis=0)
        columns = []
        for target in targets.values():
            wanted = 1.0 + hashed_ngrams(target.texts, self.buckets).sum(axis=0)
            columns.append(np.log(wanted / wanted.sum()) - np.log(raw / raw.sum()))
        return np.stack(columns, axis=1)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        counts = hashed_ngrams(shard.texts, self.buckets)
        scores = counts @ state
        if self.by == "word":
            scores /= np.maximum(counts.sum(axis=1), 1)[:, None]
        return scores.astype(np.float32)
