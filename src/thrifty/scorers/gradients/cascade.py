"""Cascade: words for all rows, hidden states for the best of them, gradients for a short-list.

    all rows                       -> ``first`` (hashed n-grams)
    the best share_by_vectors      -> ``embedding``, of ``model``
    the best share_by_gradients    -> ``less``, of ``model``, its warm-up on the short-list

Shares are of the pool's tokens, which is what a stage costs by. A stage passes on the rows that
stand best for any of the targets; rows that score the same are passed on together or not at all. A
row's score is the stage that it reached and, within, a monotone map of that stage's score s,

    stage + (1 + s / (1 + |s|)) / 2,       stage = 0, 1, 2

so that a row that a later stage saw ranks above one that it did not. A stage whose rows would all
be passed on is skipped. Dearer methods on fewer rows: the proxy-then-verify of arXiv:2606.10706;
what each alone is worth for its FLOPs is in arXiv:2410.16208.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ordering import best_first, fill
from thrifty.core.ranges import check_ranges
from thrifty.core.resolve import resolve
from thrifty.signals.some_rows import SomePool, rows_among


@dataclass(frozen=True, kw_only=True)
class Cascade(Scorer):
    """Words for all rows, hidden states for the best of them, gradients for a short-list."""

    model: str = ""
    """Folder or hub name of the model for both later stages, best a small one; empty: the one to be
    trained."""
    first: Literal["dsir", "bm25"] = "dsir"
    """What looks at all rows: ``dsir`` by word, which favours no length, or ``bm25``."""
    share_by_vectors: float = 0.2
    """Of the pool's tokens, in the rows whose hidden states are looked at."""
    share_by_gradients: float = 0.05
    """Of the pool's tokens, in the rows whose gradients are."""
    max_warmup_rows: int = 2_000
    """Rows of the short-list that the warm-up for the gradients trains on, drawn at random."""
    epochs: int = 2
    """Of the warm-up; a checkpoint each."""
    layers: int = 0
    """Gradients are of the last so many decoder layers; 0: of all."""
    max_target_rows: int = 128
    """Target rows that the later stages compare with, the first so many."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "gradient"
    source: ClassVar[str] = "arXiv:2606.10706; its stages arXiv:2302.03169, 2503.01807, 2402.04333"
    worth: ClassVar[Worth] = Worth(
        3.0, 2.0, "LESS's where the stages before keep its rows: 8 to 13 times random, 2410.16208"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            share_by_vectors=(0, 1),
            share_by_gradients=(0, 1),
            max_warmup_rows=(1, inf),
            epochs=(1, inf),
            layers=(0, inf),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )
        if self.share_by_gradients > self.share_by_vectors:
            raise ValueError(
                f"share_by_gradients {self.share_by_gradients:g} is more than share_by_vectors "
                f"{self.share_by_vectors:g}\nhint: the short-list is a part of the rows before it"
            )

    def _stages(self) -> list[tuple[int, Scorer, float]]:
        """Number, scorer and share of each stage that decides something."""
        shown = {"model": self.model, "max_target_rows": self.max_target_rows}
        warm = {
            "max_warmup_rows": self.max_warmup_rows,
            "epochs": self.epochs,
            "layers": self.layers,
            "seed": self.seed,
        }
        first: Any = {"dsir": {"by": "word"}} if self.first == "dsir" else self.first
        specs = [first, {"embedding": shown}, {"less": shown | warm}]
        shares = [1.0, self.share_by_vectors, self.share_by_gradients, 0.0]
        return [
            (number, resolve("scorer", spec), shares[number])
            for number, spec in enumerate(specs)
            if shares[number] > shares[number + 1]
        ]

    def cost(self, work: Work) -> Cost:
        total = Cost()
        for _, scorer, share in self._stages():
            total += scorer.cost(replace(work, pool=work.pool.part(share)))
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> _Seen:
        """All stages but the last run here, since each ranks what it passes on."""
        ids = np.concatenate([shard.ids for shard in pool.shards()])
        num_tokens = np.concatenate([shard.num_tokens for shard in pool.shards()])
        order = np.argsort(ids)
        ids, num_tokens = ids[order], num_tokens[order]
        placed = np.zeros((len(ids), len(targets)), dtype=np.float32)
        left = np.arange(len(ids))  # places in ids of the rows that are still in
        stages = self._stages()
        for (number, scorer, _), (_, _, share) in pairwise(stages):
            part = SomePool(pool, ids[left])
            state = scorer.prepare(part, targets, models, meter)
            scores = _by_id(part, scorer, state, meter)
            placed[left] = _placed(number, scores)
            passed = _best(scores, ids[left], num_tokens[left], share * num_tokens.sum())
            left = left[passed]
            if not len(left):
                return _Seen(ids, placed)
        number, scorer, _ = stages[-1]
        listed = ids[left]
        state = scorer.prepare(SomePool(pool, listed), targets, models, meter)
        return _Seen(ids, placed, listed, number, scorer, state)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        found: NDArray[np.float32] = state.placed[np.searchsorted(state.ids, shard.ids)]
        rows = rows_among(shard, state.listed)
        if len(rows):
            scores = state.scorer.score(rows, state.state, meter)
            found[rows.places] = _placed(state.number, scores)
        return found


class _Seen(NamedTuple):
    ids: NDArray[np.int64]  # [n], sorted
    placed: NDArray[np.float32]  # [n, num_targets], by the stages before the last
    listed: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    """Ids, sorted, of the rows that the last stage looks at."""
    number: int = 0
    scorer: Any = None
    state: Any = None


def _placed(stage: int, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Above all that an earlier stage gives, in the order of ``scores``."""
    exact = scores.astype(np.float64)
    return (stage + 0.5 * (1 + exact / (1 + np.abs(exact)))).astype(np.float32)


def _by_id(pool: SomePool, scorer: Scorer, state: Any, meter: Meter) -> NDArray[np.float32]:
    """[n, num_targets] of all its rows, in the order of their ids."""
    found = [(rows.ids, scorer.score(rows, state, meter)) for rows in pool.shards()]
    order = np.argsort(np.concatenate([ids for ids, _ in found]))
    return np.concatenate([scores for _, scores in found])[order]


def _best(
    scores: NDArray[np.float32],
    ids: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    max_tokens: float,
) -> NDArray[np.int64]:
    """Places, in order, of the rows that stand best for any target, as many as the tokens allow;
    none that scores as one left out does."""
    ranks = [np.unique(column, return_inverse=True)[1] for column in scores.T]
    best = np.max(ranks, axis=0)
    order = best_first(best, ids, 0)
    taken = order[fill(num_tokens[order], max_tokens)]
    left_out = np.delete(np.arange(len(ids)), taken)
    return np.sort(taken[~np.isin(best[taken], best[left_out])])
