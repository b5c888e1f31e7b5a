"""GraNd: how large a row's gradient is (Paul et al. 2021, arXiv:2107.07075).

    score(z) = | grad over theta of L(z; theta) |

over all weights, or those of the last ``layers`` decoder layers. Exact, from products of tokens
with tokens wherever that is cheaper than the gradient itself. High = hard, or wrong: a picker that
cuts the hardest (``coverage``, ``band``) keeps the damaged rows out.
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
from thrifty.signals.example_gradients import each_batch
from thrifty.signals.gradients import (
    last_layers_cost,
    last_layers_flops,
    last_layers_weights,
)


@dataclass(frozen=True, kw_only=True)
class Grand(Scorer):
    """How large a row's gradient is; high = hard, or wrong."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    layers: int = 0
    """The last so many decoder layers; 0: all weights."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "gradient"
    source: ClassVar[str] = "arXiv:2107.07075"
    worth: ClassVar[Worth] = Worth(1.0, 0.8, "prunes images well, arXiv:2107.07075; not text")

    def __post_init__(self) -> None:
        check_ranges(self, layers=(0, inf))

    def cost(self, work: Work) -> Cost:
        return last_layers_cost(work, work.pool, self.layers, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        found = np.zeros(len(shard), dtype=np.float32)
        model, flops = state.base(), last_layers_flops(state.shape, self.layers)
        wanted = last_layers_weights(model, self.layers)
        for places, gradients in each_batch(model, wanted, state.tokens(shard), meter, flops):
            found[places] = gradients.squared_norms().sqrt().float().cpu().numpy()
        return found[:, None]
