"""Gradients of the last decoder layers' weights, or of all: which they are and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Work
from thrifty.costs.flops import gradient_score_flops
from thrifty.costs.setting import MemorySetting
from thrifty.signals.example_gradients import gradients_cost
from thrifty.signals.forward import shape_of
from thrifty.signals.models import layers_of

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


def last_layers_weights(model: Any, num_layers: int) -> list[Any]:
    """Of the last ``num_layers`` decoder layers; of the whole model for 0.

    Raises ValueError for a model without that many.
    """
    if not num_layers:
        return [weight for weight in model.parameters() if weight.is_floating_point()]
    layers = layers_of(model)
    if len(layers) < num_layers:
        raise ValueError(
            f"{type(model).__name__} has {len(layers)} layers, not {num_layers}\n"
            "hint: ask for fewer"
        )
    chosen = list(layers)[-num_layers:]
    return [w for layer in chosen for w in layer.parameters() if w.is_floating_point()]


def last_layers_flops(shape: ModelShape, num_layers: int) -> Callable[[int, int], float]:
    """Of a batch: rows and their padded length -> FLOPs."""
    return lambda rows, length: gradient_score_flops(
        shape, rows, length, last_layers=num_layers or None
    )


def last_layers_cost(work: Work, stats: PoolStats, num_layers: int, model: str = "") -> Cost:
    """Predicted cost of these gradients over rows like ``stats``."""
    shape = shape_of(work, model)
    if not num_layers:
        return gradients_cost(work, stats, MemorySetting(), shape.num_parameters, model)
    indices = range(shape.num_layers - num_layers, shape.num_layers)
    elements = sum(shape.layer_parameters(index) for index in indices)
    setting = MemorySetting(only_layers=frozenset(indices))
    return gradients_cost(work, stats, setting, elements, model)
