"""Datamodel: how much a row lowers the target's loss, from retrainings on random parts of the pool
(arXiv:2202.00622).

    f(S) = w_0 + sum over z in S of w_z,   fitted to the target's loss after training on S;
    score(z, target) = -w_z

for ``num_subsets`` subsets S, each ``share`` of the rows. Retrained is an adapter on every linear,
from the same start. With far fewer subsets than rows the fit is a ridge regression, whose damping
is chosen by leaving one subset out; the paper's lasso needs as many subsets as it has nonzero
weights. An oracle for small pools: what other scores predict is measured here, at the price of so
many trainings, and as noisy as they are few.
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
from thrifty.costs.setting import Adapter
from thrifty.signals.forward import example_losses, scoring_cost
from thrifty.signals.kernel_ridge import ridge_coefficients
from thrifty.signals.proxy_run import proxy_run, proxy_run_cost
from thrifty.signals.trajectories import drawn_examples


@dataclass(frozen=True, kw_only=True)
class Datamodel(Scorer):
    """How much a row lowers the target's loss, from trainings on random parts of a small pool."""

    model: str = ""
    """Folder or hub name of the model to train, best a small one; empty: the one to be trained."""
    num_subsets: int = 16
    """Trainings. The error of a weight falls with their root: a ranking to trust takes hundreds."""
    share: float = 0.5
    """Of the pool's rows, in each subset."""
    epochs: int = 1
    """Of each training."""
    rank: int = 8
    learning_rate: float = 1e-3
    max_rows: int = 10_000
    """A larger pool is refused: it would take trainings beyond count to tell its rows apart."""
    max_target_rows: int = 128
    """Target rows whose loss is measured, the first so many."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "training"
    source: ClassVar[str] = "arXiv:2202.00622; for selection DsDm, arXiv:2401.12926"
    worth: ClassVar[Worth] = Worth(
        2.0, 2.0, "DsDm: 2 times the compute (arXiv:2401.12926), of far more trainings than here"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            num_subsets=(2, inf),
            share=(0.01, 0.99),
            epochs=(1, inf),
            rank=(1, inf),
            learning_rate=(0, 1),
            max_rows=(1, inf),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    def cost(self, work: Work) -> Cost:
        subset = work.pool.part(self.share)
        total = proxy_run_cost(work, subset, self.epochs, self.model, Adapter(rank=self.rank))
        for target in work.targets.values():
            shown = target.part(min(1.0, self.max_target_rows / max(target.num_examples, 1)))
            total += scoring_cost(work, shown, self.model)
        return total * self.num_subsets

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The rows' ids, sorted, and their scores [n, num_targets].

        Raises ValueError for a pool of more than ``max_rows``.
        """
        num_rows = sum(len(shard.ids) for shard in pool.shards())
        if num_rows > self.max_rows:
            raise ValueError(
                f"datamodel retrains on parts of the pool, and {num_rows:,} rows are more than its "
                f"max_rows of {self.max_rows:,}\n"
                "hint: scorer less or tracin for a pool of this size, or raise max_rows"
            )
        own = models.other(self.model)
        ids, examples = drawn_examples(pool, own, self.max_rows, self.seed)
        shown = [own.tokens(target)[: self.max_target_rows] for target in targets.values()]
        size = max(1, round(self.share * len(ids)))
        chosen = np.zeros((self.num_subsets, len(ids)))
        losses = np.zeros((self.num_subsets, len(shown)))
        for number in range(self.num_subsets):
            drawn = np.random.default_rng((self.seed, number)).permutation(len(ids))[:size]
            chosen[number, drawn] = 1.0
            trained = proxy_run(
                own.base(),
                own.shape,
                [examples[row] for row in np.sort(drawn).tolist()],
                meter,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                seed=self.seed,
                adapter=Adapter(rank=self.rank),
            )
            losses[number] = [
                example_losses(trained, own.shape, rows, meter).objective for rows in shown
            ]
        return ids, -subset_weights(chosen, losses).astype(np.float32)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        ids, scores = state
        found: NDArray[np.float32] = scores[np.searchsorted(ids, shard.ids)]
        return found


def subset_weights(chosen: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """[num_rows, m]: ``w`` of the ridge regression of losses [num_subsets, m] on which rows were
    in a subset [num_subsets, num_rows], both about their means."""
    rows = chosen - chosen.mean(axis=0)
    coefficients = ridge_coefficients(rows @ rows.T, losses - losses.mean(axis=0))
    return np.asarray(rows.T @ coefficients)
