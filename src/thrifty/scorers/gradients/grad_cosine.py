"""Gradient cosine: rows whose gradient points where the target's does.

    score(z, target) = cos( g(z), mean over v in target of g(v) / |g(v)| ),   g = grad of L at theta

over the weights of the last decoder layer, exact, a batch at a time; the backward stops below that
layer. It is the single-checkpoint, unprojected core of LESS (arXiv:2402.04333) without
warm-up and without Adam's direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Tokens, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.beside import products_cost
from thrifty.signals.example_gradients import BatchGradients, each_batch
from thrifty.signals.gradients import (
    last_layers_cost,
    last_layers_elements,
    last_layers_flops,
    last_layers_weights,
    norms_flops,
)

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape

_SHOWN_ELEMENTS = 8192
"""Of a weight's gradient, by which its direction is compared."""


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
        total = last_layers_cost(work, work.pool, 1)
        length = max(2, min(round(work.pool.mean_tokens), work.max_length))
        each = self._compared(work.shape, len(work.targets), length)
        total += products_cost(work, each * work.pool.num_examples)
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += last_layers_cost(work, target, 1) * share
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Models, list[Any]]:
        """The model, and the part of each weight in the targets' directions
        [num_targets, elements]."""
        import torch

        directions = []
        flops = last_layers_flops(models.shape, 1)
        for target in targets.values():
            total: Any = 0.0
            shown = target.tokens[: self.max_target_rows]
            for _, gradients in self._each(models, shown, meter, flops):
                flat = gradients.flat()
                total = total + (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)).sum(0)
            directions.append(total / total.norm().clamp_min(1e-30))
        sizes = [weight.numel() for weight in last_layers_weights(models.base(), 1)]
        return models, list(torch.stack(directions).split(sizes, dim=1))

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        models, directions = state
        found = np.zeros((len(shard), len(directions[0])), dtype=np.float32)
        each = last_layers_flops(models.shape, 1)

        def flops(rows: int, length: int) -> float:
            compared = self._compared(models.shape, len(directions[0]), length)
            return each(rows, length) + rows * compared

        for places, gradients in self._each(models, shard.tokens, meter, flops):
            norms = gradients.squared_norms().sqrt().clamp_min(1e-30)
            cosines = gradients.products(directions) / norms[:, None]
            found[places] = cosines.float().cpu().numpy()
        return found

    def direction(self, state: Any) -> NDArray[np.float32]:
        """Of the elements a random part, the same at every look."""
        _, directions = state
        random = np.random.default_rng(0)
        kept = []
        for direction in directions:
            size = direction.shape[1]
            places = np.sort(random.integers(0, size, min(size, _SHOWN_ELEMENTS)))
            kept.append(direction[:, places].float().cpu().numpy())
        return np.concatenate(kept, axis=1)

    @staticmethod
    def _compared(shape: ModelShape, num_targets: int, length: int) -> float:
        """FLOPs of an example's norm and of its products with the directions."""
        products = 2.0 * num_targets * last_layers_elements(shape, 1)
        return products + norms_flops(shape, 1, length)

    def _each(
        self,
        models: Models,
        examples: Sequence[Tokens],
        meter: Meter,
        flops: Callable[[int, int], float],
    ) -> Iterator[tuple[list[int], BatchGradients]]:
        wanted = last_layers_weights(models.base(), 1)
        return each_batch(models.base(), wanted, examples, meter, flops)
