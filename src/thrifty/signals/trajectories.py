"""What every example did over the epochs of a proxy run: float16 ``[num_examples, num_epochs]``.

    loss         L_t = mean over its tokens of - log p_t(y)
    probability  mean of p_t(y)                                   (cartography, arXiv:2009.10795)
    margin       mean of z_t(y) - max over k != y of z_t(k)       (AUM, arXiv:2001.10528)
    accuracy     share of its tokens that are the argmax          (forgetting, arXiv:1812.05159)

t counts the epochs; a value is of the weights just before the example's own step in that epoch.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Tokens, Work
from thrifty.core.ordering import random_key
from thrifty.signals.proxy_run import proxy_run, proxy_run_cost

STATISTICS = ("loss", "probability", "margin", "accuracy")
_BYTES_PER_TOKEN = 5.0
"""Of the rows that are trained on, which are held: an int32 and a mask."""


@dataclass(frozen=True)
class Trajectories:
    """Of the rows that were trained on, sorted by id."""

    ids: NDArray[np.int64]  # [n]
    values: NDArray[np.float16]  # [n, num_epochs, statistics], memory-mapped; NaN = no loss token

    def of(self, statistic: str) -> NDArray[np.float64]:
        """[n, num_epochs]"""
        return np.asarray(self.values[:, :, STATISTICS.index(statistic)], dtype=np.float64)

    def rows(self, ids: NDArray[np.int64], per_row: NDArray[np.floating]) -> NDArray[np.float32]:
        """[len(ids), 1]: of ``per_row`` (one value a row trained on) those of ``ids``; NaN for rows
        that were not trained on."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        known = self.ids[places] == ids
        return np.where(known, per_row[places], np.nan).astype(np.float32)[:, None]


def record(
    pool: Pool,
    models: Models,
    meter: Meter,
    *,
    epochs: int,
    learning_rate: float,
    max_rows: int,
    seed: int,
) -> Trajectories:
    """Train a copy of ``models``' model on the pool, on ``max_rows`` of it at most, and watch.

    Which rows, and their order, depends on ids and seed, not on shards.
    """
    ids, examples = drawn_examples(pool, models, max_rows, seed)
    shape = (max(len(ids), 1), epochs, len(STATISTICS))
    with tempfile.TemporaryFile(prefix="thrifty-trajectories-") as file:
        values: NDArray[np.float16] = np.memmap(file, np.float16, "w+", shape=shape)
    values[:] = np.nan

    def watch(
        epoch: int, batch: list[int], nll: Any, logits: Any, following: Any, keep: Any
    ) -> None:
        best = logits.topk(2, dim=-1)
        own = logits.gather(-1, following[..., None])[..., 0]
        right = best.indices[..., 0] == following
        other = best.values[..., 0].where(~right, best.values[..., 1])
        count = keep.sum(1)
        for place, each in enumerate((nll, (-nll).exp(), own - other, right)):
            mean = (each.double() * keep).sum(1) / count
            values[batch, epoch, place] = mean.clamp(-6e4, 6e4).cpu().numpy()

    proxy_run(
        models.base(),
        models.shape,
        examples,
        meter,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        watch=watch,
    )
    return Trajectories(ids, values[: len(ids)])


def drawn_examples(
    pool: Pool, models: Models, max_rows: int, seed: int
) -> tuple[NDArray[np.int64], list[Tokens]]:
    """At most so many rows of the pool, drawn at random, in the order of their ids."""
    ids = np.concatenate([shard.ids for shard in pool.shards()])
    if len(ids) > max_rows:
        ids = ids[np.argsort(random_key(ids, seed), kind="stable")[:max_rows]]
    ids = np.sort(ids)
    examples: dict[int, Tokens] = {}
    for shard in pool.shards():
        wanted = np.flatnonzero(np.isin(shard.ids, ids))
        if len(wanted):
            tokens = models.tokens(shard)
            examples |= {int(shard.ids[i]): tokens[i] for i in wanted.tolist()}
    return ids, [examples[row] for row in ids.tolist()]


def record_cost(work: Work, epochs: int, max_rows: int, model: str) -> Cost:
    """Predicted cost of ``record``."""
    stats = work.pool.part(min(1.0, max_rows / max(work.pool.num_examples, 1)))
    cost = proxy_run_cost(work, stats, epochs, model)
    held = stats.num_tokens * _BYTES_PER_TOKEN
    return replace(cost, peak_memory_bytes=cost.peak_memory_bytes + held)
