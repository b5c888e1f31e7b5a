"""Reducible loss: what a model loses on a row, beyond what one that knows the target loses
(RHO-loss, arXiv:2206.07137; CoLoR-Filter, arXiv:2406.10670).

    score(z, target) = L(z; theta) - L(z; theta_target)

theta is the base model, theta_target the same after ``epochs`` over the target's rows, or any model
given as ``reference``. High = not known yet, and like what helps with the target; noise is high for
both models and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.forward import example_losses, scoring_cost
from thrifty.signals.proxy_run import proxy_run, proxy_run_cost


@dataclass(frozen=True, kw_only=True)
class Rho(Scorer):
    """What a row has to teach that a model trained on the target already knows."""

    reference: str = ""
    """Folder or hub name of a model that knows the target; empty: one is trained on its rows."""
    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    epochs: int = 3
    learning_rate: float = 1e-4
    max_target_rows: int = 256
    """Target rows that the reference is trained on, the first so many."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "arXiv:2206.07137; offline form arXiv:2406.10670"
    worth: ClassVar[Worth] = Worth(
        2.0, 1.2, "18 times fewer steps on Clothing-1M, arXiv:2206.07137; on text arXiv:2406.10670"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            epochs=(1, inf),
            learning_rate=(0, 1),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    @property
    def looks_at(self) -> tuple[str, ...]:
        return (self.model, self.reference) if self.reference else (self.model,)

    def cost(self, work: Work) -> Cost:
        total = scoring_cost(work, work.pool, self.model)
        for target in work.targets.values():
            total += scoring_cost(work, work.pool, self.reference or self.model)
            if not self.reference:
                share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
                total += proxy_run_cost(work, target, self.epochs, self.model) * share
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Models, Sequence[tuple[Any, Models]]]:
        """The model to score with, and for each target the reference with its tokenizer."""
        own = models.other(self.model)
        if self.reference:
            other = models.other(self.reference)
            return own, [(other.base(), other)] * len(targets)
        references = []
        for target in targets.values():
            trained = proxy_run(
                own.base(),
                own.shape,
                own.tokens(target)[: self.max_target_rows],
                meter,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                seed=self.seed,
            )
            references.append((trained, own))
        return own, references

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        own, references = state
        loss = example_losses(own.base(), own.shape, own.tokens(shard), meter).mean
        columns = []
        for reference, of in references:
            known = example_losses(reference, of.shape, of.tokens(shard), meter).mean
            columns.append(loss - known)
        return np.stack(columns, axis=1).astype(np.float32)
