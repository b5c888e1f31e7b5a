"""CADS: which groups of rows to train on under a given budget of training, learnt by trying
(arXiv:2510.16806).

    min over p of  E over m ~ Bernoulli(p) of  R(m),
    R(m) = L_target(theta_m) + penalty * L_m(theta_m)

theta_m: after the inner budget, so many rows of the groups in m. The bi-level problem, in which
theta_m would minimise L_m, in its penalty form: what the budget leaves unlearnt of the rows chosen
counts against them, so a small one picks rows that are learnt fast, a large one those that bring
most. Its gradient is REINFORCE's, with the other draws of a round as the baseline:

    p_g = sigmoid(phi_g),   phi_g += rate * mean_i (mean_{j != i} R_j - R_i) / std(R) * (m_ig - p_g)

score(z, target) = phi of its group. Groups are k-means clusters of hashed n-grams, a row each where
there are few. Every inner run begins at the base model, the paper's goes on from one to the next;
L_m is the loss of the last epoch as it was trained on, so that it takes no pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Tokens, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import Adapter
from thrifty.signals.clusters import k_means
from thrifty.signals.forward import example_losses, scoring_cost
from thrifty.signals.ngrams import hashed_ngrams, ngrams_cost
from thrifty.signals.proxy_run import proxy_run, proxy_run_cost
from thrifty.signals.trajectories import drawn_examples

BUCKETS = 512
"""Of n-grams."""
MOST_ODDS = 4.0
"""ln of the odds of a group, at most: a policy that is sure learns no more."""


@dataclass(frozen=True, kw_only=True)
class Cads(Scorer):
    """Groups of rows that pay under the training budget, learnt by many short trainings."""

    model: str = ""
    """Folder or hub name of the model to train, best a small one; empty: the one to be trained."""
    num_groups: int = 16
    """Of like rows, kept or left together."""
    rounds: int = 8
    """Steps of the policy."""
    draws: int = 4
    """Trainings of a round."""
    share: float = 0.25
    """Of the pool's rows, that each trains on: the inner budget, best that of the run."""
    epochs: int = 1
    """Of each training."""
    rank: int = 8
    """Of the adapters trained; 0 trains all weights."""
    learning_rate: float = 1e-3
    penalty: float = 0.1
    """Of what is left unlearnt of the rows chosen."""
    rate: float = 1.0
    """Of the policy."""
    max_rows: int = 10_000
    """A larger pool is refused."""
    max_target_rows: int = 128
    """Target rows whose loss is measured, the first so many."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "training"
    source: ClassVar[str] = "arXiv:2510.16806"
    worth: ClassVar[Worth] = Worth(
        1.5, 1.5, "up to 14% better than other selections, arXiv:2510.16806; of far more trainings"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            num_groups=(1, inf),
            rounds=(1, inf),
            draws=(2, inf),
            share=(0.001, 1),
            epochs=(1, inf),
            rank=(0, inf),
            learning_rate=(0, 1),
            penalty=(0, inf),
            rate=(0, inf),
            max_rows=(1, inf),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    @property
    def _adapter(self) -> Adapter | None:
        return Adapter(rank=self.rank) if self.rank else None

    def cost(self, work: Work) -> Cost:
        rows = work.pool.part(self.share)
        total = proxy_run_cost(work, rows, self.epochs, self.model, self._adapter)
        for target in work.targets.values():
            shown = target.part(min(1.0, self.max_target_rows / max(target.num_examples, 1)))
            total += scoring_cost(work, shown, self.model)
        return total * (self.rounds * self.draws) + ngrams_cost(work, 1)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The rows' ids, sorted, and their scores [n, num_targets].

        Raises ValueError for a pool of more than ``max_rows``.
        """
        num_rows = sum(len(shard.ids) for shard in pool.shards())
        if num_rows > self.max_rows:
            raise ValueError(
                f"cads trains on parts of the pool again and again, and {num_rows:,} rows are more "
                f"than its max_rows of {self.max_rows:,}\n"
                "hint: scorer dsir or less for a pool of this size, or raise max_rows"
            )
        own = models.other(self.model)
        ids, examples = drawn_examples(pool, own, self.max_rows, self.seed)
        group = self._groups(pool, ids)
        shown = [own.tokens(target)[: self.max_target_rows] for target in targets.values()]

        def loss_of(mask: NDArray[np.bool_], number: int) -> NDArray[np.float64]:
            rows = self._rows(mask[group], number)
            return self._tried(own, [examples[row] for row in rows], shown, meter)

        phi = reinforce(
            loss_of,
            int(group.max()) + 1,
            len(shown),
            rounds=self.rounds,
            draws=self.draws,
            rate=self.rate,
            seed=self.seed,
        )
        return ids, phi[group].astype(np.float32)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        ids, scores = state
        found: NDArray[np.float32] = scores[np.searchsorted(ids, shard.ids)]
        return found

    def _groups(self, pool: Pool, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] of each row; consecutive from 0."""
        if len(ids) <= self.num_groups:
            return np.arange(len(ids))
        texts: dict[int, str] = {}
        for shard in pool.shards():
            texts |= dict(zip(shard.ids.tolist(), shard.texts, strict=True))
        counts = hashed_ngrams([texts[row] for row in ids.tolist()], BUCKETS).toarray()
        lengths = np.linalg.norm(counts, axis=1, keepdims=True)
        found = k_means(counts / np.maximum(lengths, 1.0), self.num_groups, self.seed)
        return np.unique(found, return_inverse=True)[1].astype(np.int64)

    def _rows(self, chosen: NDArray[np.bool_], number: int) -> list[int]:
        """The inner budget's rows of those chosen, at random; again where they are too few."""
        size = max(1, round(self.share * len(chosen)))
        order = np.random.default_rng((self.seed, number)).permutation(np.flatnonzero(chosen))
        return np.sort(np.resize(order, size)).tolist()

    def _tried(
        self, own: Models, examples: Sequence[Tokens], shown: Sequence[Any], meter: Meter
    ) -> NDArray[np.float64]:
        """R for each target, of a training on these rows."""
        last = [0.0, 0.0]

        def watch(epoch: int, places: Any, nll: Any, logits: Any, ids: Any, keep: Any) -> None:
            if epoch == self.epochs - 1:
                last[0] += float((nll * keep).sum())
                last[1] += float(keep.sum())

        trained = proxy_run(
            own.base(),
            own.shape,
            examples,
            meter,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            seed=self.seed,
            watch=watch,
            adapter=self._adapter,
        )
        unlearnt = last[0] / max(last[1], 1.0)
        losses = [example_losses(trained, own.shape, rows, meter).objective for rows in shown]
        return np.array(losses) + self.penalty * unlearnt


def reinforce(
    loss_of: Callable[[NDArray[np.bool_], int], NDArray[np.float64]],
    num_groups: int,
    num_targets: int,
    *,
    rounds: int,
    draws: int,
    rate: float,
    seed: int,
) -> NDArray[np.float64]:
    """[num_groups, num_targets] ``phi``: ln of a group's odds. ``loss_of(mask, number of the
    draw)``: [num_targets]. The policy that is drawn from is the targets' mean."""
    random = np.random.default_rng((seed, num_groups))
    phi = np.zeros((num_groups, num_targets))
    for number in range(rounds):
        odds = phi.mean(axis=1)
        p = 1.0 / (1.0 + np.exp(-odds))
        masks = random.random((draws, num_groups)) < p
        empty = ~masks.any(axis=1)
        masks[empty, int(odds.argmax())] = True
        losses = np.array([loss_of(mask, number * draws + i) for i, mask in enumerate(masks)])
        others = (losses.sum(axis=0) - losses) / (draws - 1)
        spread = float(losses.mean(axis=1).std())
        if not spread > 0:
            continue
        steps = np.einsum("dt,dg->gt", (others - losses) / spread, masks - p) / draws
        phi = np.clip(phi + rate * steps, -MOST_ODDS, MOST_ODDS)
    return phi
