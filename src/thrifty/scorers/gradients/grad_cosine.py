"""Gradient cosine: rows whose gradient points where the target's does.

    score(z, target) = cos( g(z), mean over v in target of g(v) / |g(v)| ),   g = grad of L at theta

over the weights of the last decoder layer, one exact backward per example; the backward stops
below that layer. It is the single-checkpoint, unprojected core of LESS (arXiv:2402.04333) without
warm-up and without Adam's direction.
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
from thrifty.signals.gradients import example_gradients, gradient_scoring_cost


@dataclass(frozen=True, kw_only=True)
class GradCosine(Scorer):
    """Cosine of a row's last-layer gradient with the target's mean gradient."""

    max_target_rows: int = 128
    """Target rows whose gradients are averaged, the first so many."""

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient"]] = "gradient"
    source: ClassVar[str] = "single-checkpoint form of arXiv:2402.04333"
    worth: ClassVar[Worth] = Worth(
        3.0, 2.0, "LESS: 8 to 13 times random at 2.5% (arXiv:2410.16208); plain cosine is weaker"
    )

    def __post_init__(self) -> None:
        check_ranges(self, max_target_rows=(1, inf))

    def cost(self, work: Work) -> Cost:
        total = gradient_scoring_cost(work, work.pool)
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += gradient_scoring_cost(work, target) * share
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Any, Any, Any]:
        import torch

        model, shape = models.base(), models.shape
        directions = []
        for target in targets.values():
            total = None
            for gradient in example_gradients(
                model, shape, target.tokens[: self.max_target_rows], meter
            ):
                unit = gradient / gradient.norm().clamp_min(1e-30)
                total = unit if total is None else total + unit
            assert total is not None
            directions.append(total / total.norm().clamp_min(1e-30))
        return model, shape, torch.stack(directions)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        model, shape, directions = state
        rows = [
            (directions @ gradient / gradient.norm().clamp_min(1e-30)).cpu().numpy()
            for gradient in example_gradients(model, shape, shard.tokens, meter)
        ]
        return np.stack(rows).astype(np.float32)
