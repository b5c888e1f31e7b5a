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
        if self.reference:
            return total + scoring_cost(work, work.pool, self.reference)
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += scoring_cost(work, work.pool, self.model)
            total += proxy_run_cost(work, target, self.epochs, self.model) * share
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Models, Sequence[tuple[Any, Models]]]:
        """The model to score with, and for each target the reference with its tokenizer. Raises
        ValueError for a reference that splits rows otherwise."""
        own = models.other(self.model)
        if self.reference:
            other = models.other(self.reference)
            self._check_tokens(own, other, targets)
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

    def _check_tokens(self, own: Models, other: Models, targets: Mapping[str, Rows]) -> None:
        for rows in targets.values():
            for one, two in zip(own.tokens(rows), other.tokens(rows), strict=True):
                shared = min(len(one.input_ids), len(two.input_ids))  # a context may cut a row
                if not np.array_equal(one.input_ids[:shared], two.input_ids[:shared]):
                    raise ValueError(
                        f"{self.reference} splits rows otherwise than {self.model or 'the model'}, "
                        "so that their losses of a token cannot be compared\n"
                        "hint: rho: {reference: ...} takes a model of the same tokenizer"
                    )

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        own, references = state
        loss = example_losses(own.base(), own.shape, own.tokens(shard), meter).mean
        known: dict[int, NDArray[np.floating]] = {}
        for reference, of in references:  # one for each target, or the same for all
            if id(reference) not in known:
                found = example_losses(reference, of.shape, of.tokens(shard), meter)
                known[id(reference)] = found.mean
        columns = [loss - known[id(reference)] for reference, _ in references]
        return np.stack(columns, axis=1).astype(np.float32)
