"""LoGra: influence of all weights in few dimensions a linear (Choe et al. 2024, arXiv:2405.13954).

    phi(z) = P_l^T (sum over tokens of l_t r_t^T) P_r          of each linear, rank x rank numbers
    score(z, target) = sum over linears of
                       < phi(z), (F + lambda)^-1 mean over v in target of phi(v) >

l is the gradient at what the linear puts out, r what it is given, P random with orthonormal
columns, F the mean of phi phi^T over a sample of the pool, lambda 0.1 times its mean eigenvalue.
Both sides are projected before they meet: no gradient of a weight is ever formed, which is what
makes full weights affordable. Of the model as it is, with no warm-up and no adapter; all scores are
up to one factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Tokens, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting
from thrifty.signals.beside import Beside, decompositions_cost
from thrifty.signals.curvature import Sizes, num_elements, ridge, ridge_flops
from thrifty.signals.example_gradients import each_batch
from thrifty.signals.forward import shape_of
from thrifty.signals.gradient_costs import gradients_cost
from thrifty.signals.gradients import last_layers_flops
from thrifty.signals.trajectories import drawn_examples
from thrifty.signals.two_sided import (
    TwoSided,
    last_layers,
    linear_sizes,
    linears_of_last_layers,
    projected_sizes,
    projection_flops,
)


@dataclass(frozen=True)
class Projected:
    """What scoring a shard takes."""

    own: Models
    sides: TwoSided
    directions: list[Any]
    """Of each linear the targets' mean, through the curvature, ``[num_targets, a * b]``."""


@dataclass(frozen=True, kw_only=True)
class Logra(Scorer):
    """Rows whose gradient of all weights, projected a linear at a time, helps the target's."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    layers: int = 0
    """The linears of the last so many decoder layers; 0: of all."""
    rank: int = 16
    """Of the projection of each side."""
    max_target_rows: int = 128
    """Target rows whose gradients are averaged, the first so many."""
    max_curvature_rows: int = 1_000
    """Rows of the pool that the curvature is made from, drawn at random."""
    damping: float = 0.1
    """Added to the curvature, times its mean eigenvalue."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "gradient"
    source: ClassVar[str] = "arXiv:2405.13954"
    worth: ClassVar[Worth] = Worth(
        2.0, 1.5, "retraining agrees as with EK-FAC, arXiv:2405.13954; the untrained model here"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            layers=(0, inf),
            rank=(1, inf),
            max_target_rows=(1, inf),
            max_curvature_rows=(1, inf),
            damping=(1e-6, inf),
            seed=(0, 2**32 - 1),
        )

    def cost(self, work: Work) -> Cost:
        shape = shape_of(work, self.model)
        sizes = linear_sizes(shape, self.layers)
        num_targets = len(work.targets)
        sample = work.pool.part(min(1.0, self.max_curvature_rows / max(work.pool.num_examples, 1)))
        solving = self._ridge_flops(sizes, sample.num_examples, num_targets)
        total = decompositions_cost(work, solving)
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += self._pass_cost(work, target.part(share), self._projecting(sizes))
        total += self._pass_cost(work, sample, self._projecting(sizes))
        total += self._pass_cost(work, work.pool, self._projecting(sizes, num_targets))
        features = num_elements(projected_sizes(sizes, self.rank))
        sides = self.rank * sum(rows + columns for rows, columns in sizes)
        held = 8.0 * (sample.num_examples + num_targets) * features + 4.0 * sides
        return replace(total, peak_memory_bytes=total.peak_memory_bytes + held)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Projected:
        import torch

        own = models.other(self.model)
        wanted = linears_of_last_layers(own.base(), self.layers)
        sizes = [(weight.shape[0], weight.shape[1]) for weight in wanted]
        sides = TwoSided(wanted, self.rank, self.seed)
        _, sample = drawn_examples(pool, own, self.max_curvature_rows, self.seed)
        shown = [own.tokens(target)[: self.max_target_rows] for target in targets.values()]
        means = [
            [each.mean(0) for each in _together(self._features(own, sides, rows, meter))]
            for rows in shown
        ]
        metric = _together(self._features(own, sides, sample, meter))
        directions = [
            ridge(phi, torch.stack(towards), self.damping).to(phi.dtype)
            for phi, towards in zip(metric, zip(*means, strict=True), strict=True)
        ]
        meter.tick(Cost(flops=self._ridge_flops(sizes, len(sample), len(shown))))
        return Projected(own, sides, directions)

    def score(self, shard: Rows, state: Projected, meter: Meter) -> NDArray[np.float32]:
        num_targets = len(state.directions[0])
        found = np.zeros((len(shard), num_targets), dtype=np.float32)
        examples = state.own.tokens(shard)
        for places, features in self._features(
            state.own, state.sides, examples, meter, num_targets
        ):
            products = [
                phi @ towards.T for phi, towards in zip(features, state.directions, strict=True)
            ]
            found[places] = sum(products).cpu().numpy()
        return found

    def _features(
        self,
        own: Models,
        sides: TwoSided,
        examples: Sequence[Tokens],
        meter: Meter,
        num_targets: int = 0,
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """Places in ``examples``, and of each linear ``[batch, a * b]``."""
        wanted = linears_of_last_layers(own.base(), self.layers)
        sizes = [(weight.shape[0], weight.shape[1]) for weight in wanted]
        beside = self._projecting(sizes, num_targets)
        passing = last_layers_flops(own.shape, len(last_layers(own.shape, self.layers)))

        def flops(rows: int, length: int) -> float:
            return passing(rows, length) + beside.flops(rows, length)

        for places, gradients in each_batch(own.base(), wanted, examples, meter, flops):
            yield places, sides(gradients)

    def _projecting(self, sizes: Sizes, num_targets: int = 0) -> Beside:
        """Projections in place of the gradients themselves; products with directions."""
        features = num_elements(projected_sizes(sizes, self.rank))
        return Beside(
            per_token=projection_flops(sizes, self.rank) - 2.0 * num_elements(sizes),
            per_example=2.0 * num_targets * features,
        )

    def _ridge_flops(self, sizes: Sizes, num_rows: int, num_targets: int) -> float:
        projected = projected_sizes(sizes, self.rank)
        return sum(ridge_flops(num_rows, a * b, num_targets) for a, b in projected)

    def _pass_cost(self, work: Work, stats: PoolStats, beside: Beside) -> Cost:
        shape = shape_of(work, self.model)
        setting = MemorySetting(only_layers=frozenset(last_layers(shape, self.layers)))
        elements = num_elements(projected_sizes(linear_sizes(shape, self.layers), self.rank))
        return gradients_cost(work, stats, setting, elements, self.model) + beside.cost(work, stats)


def _together(batches: Iterator[tuple[list[int], list[Any]]]) -> list[Any]:
    """Of each linear, [rows, a * b]."""
    import torch

    return [torch.cat(each) for each in zip(*(found for _, found in batches), strict=True)]
