"""What online methods share that train on a few weighted rows in place of all, renewed on the way.

The rows are told apart by count-sketches of their gradients, over what is trained of the last
``layers`` decoder layers, of the model as it is by then.
"""

from __future__ import annotations

from abc import abstractmethod
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
from thrifty.signals.example_gradients import each_batch
from thrifty.signals.gradients import trained_cost, trained_flops, trained_matrices
from thrifty.signals.metering import adapter_of
from thrifty.signals.sketch import CountSketch


@dataclass(frozen=True, kw_only=True)
class CoresetMethod(OnlineMethod):
    """A weighted part of the rows, by their gradients."""

    keep: float = 0.3
    """Share of the rows' tokens that is trained on until the next look."""
    layers: int = 1
    """The last so many decoder layers; 0: all."""
    dimensions: int = 512
    max_rows: int = 4_000
    """That are looked at, those picked first; the others are not trained on."""
    renewals: int = 4
    seed: int = 0

    cost_class: ClassVar[Literal["free", "forward", "gradient"]] = "gradient"
    weighs_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(
            self,
            keep=(1e-3, 1),
            layers=(0, inf),
            dimensions=(1, inf),
            max_rows=(1, inf),
            renewals=(1, 20),
            seed=(0, 2**32 - 1),
        )

    @abstractmethod
    def coreset(
        self, gradients: NDArray[np.float64], tokens: NDArray[np.float64], max_tokens: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows [k] of ``gradients`` [n, dimensions] and their weights [k]."""

    def renewal_cost(self, work: Work) -> Cost:
        share = min(1.0, self.max_rows / max(work.pool.num_examples, 1))
        return trained_cost(work, work.pool.part(share), self.layers)

    def renew(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        model, rows = models.base(), chosen.tokens[: self.max_rows]
        wanted = trained_matrices(model, self.layers)
        flops = trained_flops(models.shape, adapter_of(model), self.layers)
        sketch = CountSketch(sum(w.numel() for w in wanted), self.dimensions, self.seed)
        found = np.zeros((len(rows), self.dimensions))
        for places, gradients in each_batch(model, wanted, rows, meter, flops):
            found[places] = sketch(gradients.flat()).double().cpu().numpy()
        tokens = chosen.num_tokens[: len(rows)].astype(np.float64)
        kept, weights = self.coreset(found, tokens, self.keep * tokens.sum())
        if not len(kept):  # no row is so short
            kept, weights = np.array([np.argmin(tokens)]), np.ones(1)
        return {"coreset": kept, "weights": (weights / weights.mean()).astype(np.float32)}

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        rows = known.get("coreset", np.arange(len(chosen)))
        of_row = np.ones(len(chosen), dtype=np.float32)
        of_row[rows] = known.get("weights", 1.0)
        drawn = now.least_drawn(rows, chosen.num_tokens)
        return Round(rows=drawn, weights=of_row[drawn])
