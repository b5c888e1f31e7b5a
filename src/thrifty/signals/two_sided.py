"""Gradients of linears in few numbers, from both sides, never formed whole (LoGra, Choe et al.
2024, arXiv:2405.13954).

    P_l^T (sum over t of l_t r_t^T) P_r  =  sum over t of (P_l^T l_t) (P_r^T r_t)^T

of each matrix, whose example's gradient is sum of l_t r_t^T. The columns of P are orthonormal and
random, the same for the same seed: as wide as the matrix itself, they keep inner products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.signals.gradients import last_layers_weights
from thrifty.signals.models import layers_of

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape
    from thrifty.signals.curvature import Sizes
    from thrifty.signals.example_gradients import BatchGradients


class TwoSided:
    """Gradients of a batch -> ``[batch, a * b]`` of each of the wanted matrices."""

    def __init__(self, wanted: Sequence[Any], rank: int, seed: int) -> None:
        """``rank``: a and b, of sides that are wider."""
        import torch

        self._sides = []
        for place, weight in enumerate(wanted):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            pair = []
            for side, width in enumerate(weight.shape):
                random = np.random.default_rng((seed, place, side))
                made = random.standard_normal((width, min(rank, width)))
                basis = torch.linalg.qr(torch.from_numpy(made)).Q
                pair.append(basis.to(weight.device, dtype))
            self._sides.append((pair[0], pair[1]))

    def __call__(self, gradients: BatchGradients) -> list[Any]:
        found = []
        for place, (one, other) in enumerate(self._sides):
            total = one.new_zeros(len(gradients), one.shape[1], other.shape[1])
            for left, right in gradients.outer(place) or ():
                total += (left @ one).mT @ (right @ other)
            found.append(total.flatten(1))
        return found


def linears_of_last_layers(model: Any, num_layers: int) -> list[Any]:
    """The matrices of all linears in the last ``num_layers`` decoder layers; in all for 0.

    Raises ValueError for a model without that many layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    own = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    weights = last_layers_weights(model, num_layers or len(layers_of(model)))
    return [weight for weight in weights if id(weight) in own]


def last_layers(shape: ModelShape, num_layers: int) -> range:
    """Their indices; of all for 0."""
    return range(shape.num_layers - num_layers if num_layers else 0, shape.num_layers)


def linear_sizes(shape: ModelShape, num_layers: int) -> list[tuple[int, int]]:
    """Of ``linears_of_last_layers``."""
    return [
        (linear.out_features, linear.in_features)
        for index in last_layers(shape, num_layers)
        for linear in shape.linears_of(index)
    ]


def projected_sizes(sizes: Sizes, rank: int) -> list[tuple[int, int]]:
    return [(min(rank, rows), min(rank, columns)) for rows, columns in sizes]


def projection_flops(sizes: Sizes, rank: int) -> float:
    """Of a token: both sides, and their product."""
    return 2.0 * sum(
        rows * a + columns * b + a * b
        for (rows, columns), (a, b) in zip(sizes, projected_sizes(sizes, rank), strict=True)
    )
