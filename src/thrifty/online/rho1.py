"""Tokens worth learning (selective language modelling, Rho-1, Lin et al. 2024, arXiv:2404.07965).

    e(x_t) = L(x_t; theta) - L(x_t; theta_ref),
    loss   = - 1 / (N k) sum_t [e(x_t) in the top k of the batch] log p(x_t | x_<t; theta)

theta_ref is a model that knows the target: the one given, or the base model after a few epochs over
the target's rows. Its losses are worked out once, a forward pass over the chosen rows; training
itself takes what it always takes, since a token that is not learnt from is still read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import (
    Chosen,
    Meter,
    Models,
    OnlineMethod,
    Progress,
    Round,
    Rows,
    Work,
)
from thrifty.core.ranges import check_ranges
from thrifty.signals.forward import scoring_cost, token_losses
from thrifty.signals.proxy_run import proxy_run, proxy_run_cost


@dataclass(frozen=True, kw_only=True)
class Rho1(OnlineMethod):
    """Whole passes that learn from the tokens alone that a target's model knows better."""

    keep: float = 0.6
    """k, the share of a batch's tokens that is learnt from."""
    model: str = ""
    """Folder or hub name of the reference, with the base model's tokenizer; empty: one is trained
    on the target's rows."""
    epochs: int = 3
    learning_rate: float = 1e-4
    max_target_rows: int = 256
    """Rows of each target that the reference is trained on, the first so many."""
    seed: int = 0

    source: ClassVar[str] = "arXiv:2404.07965"
    cost_class: ClassVar[Literal["free", "forward"]] = "forward"
    weighs_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(
            self,
            keep=(1e-3, 1),
            epochs=(1, inf),
            learning_rate=(0, 1),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    def cost(self, work: Work) -> Cost:
        total = scoring_cost(work, work.pool, self.model)
        for target in () if self.model else work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += proxy_run_cost(work, target, self.epochs) * share
        return total

    def prepare(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        of = models.other(self.model)
        if of.splits_anew:
            raise ValueError(
                f"{self.model} has another tokenizer than the model to be trained, so that its "
                "losses are of other tokens\n"
                "hint: rho1: {model: ...} takes a model of the same tokenizer"
            )
        reference = of.base() if self.model else self._trained(targets, models, meter)
        losses = token_losses(reference, of.shape, chosen.tokens, meter)
        starts = np.concatenate([[0], np.cumsum(chosen.num_tokens)])
        return {"losses": np.concatenate(losses).astype(np.float32), "starts": starts}

    def _trained(self, targets: Mapping[str, Rows], models: Models, meter: Meter) -> Any:
        if not targets:
            raise ValueError(
                "rho1 needs a model that knows a target, and there is none\n"
                "hint: plan with --target, or rho1: {model: FOLDER}"
            )
        known = [row for rows in targets.values() for row in rows.tokens[: self.max_target_rows]]
        return proxy_run(
            models.base(),
            models.shape,
            known,
            meter,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        return Round(rows=now.random.permutation(len(chosen)))

    def token_weights(
        self,
        known: Mapping[str, NDArray[Any]],
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        losses: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        excess = losses - known["losses"][known["starts"][rows] + places]
        most = max(1, round(self.keep * len(excess)))
        weights = np.zeros(len(excess))
        weights[np.argsort(-excess, kind="stable")[:most]] = len(excess) / most
        return weights
