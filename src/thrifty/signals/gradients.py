"""Gradients of the last decoder layers' weights, or of all: which they are and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Work
from thrifty.costs.adapted import FORMS
from thrifty.costs.flops import gradient_score_flops, step_flops
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.signals.forward import shape_of
from thrifty.signals.gradient_costs import gradients_cost
from thrifty.signals.models import layers_of

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


def last_layers_weights(model: Any, num_layers: int) -> list[Any]:
    """Of the last ``num_layers`` decoder layers; of the whole model for 0. Those that DoRA scales
    rows by are left out: they are given no tokens.

    Raises ValueError for a model without that many.
    """
    if not num_layers:
        return _with_tokens(model)
    layers = layers_of(model)
    if len(layers) < num_layers:
        raise ValueError(
            f"{type(model).__name__} has {len(layers)} layers, not {num_layers}\n"
            "hint: ask for fewer"
        )
    return [weight for layer in list(layers)[-num_layers:] for weight in _with_tokens(layer)]


def _with_tokens(module: Any) -> list[Any]:
    return [
        weight
        for name, weight in module.named_parameters()
        if weight.is_floating_point() and "lora_magnitude_vector" not in name
    ]


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


def last_layers_elements(shape: ModelShape, num_layers: int) -> int:
    """Of the last layers' weights, those of an adapter on them included."""
    indices = _last(shape, num_layers)
    own = sum(shape.layer_parameters(index) for index in indices)
    if shape.adapter is None:
        return own
    layers = tuple(set(indices).intersection(shape.adapter.layers or indices))
    return own + replace(shape.adapter, layers=layers).num_parameters(shape)


def norms_flops(shape: ModelShape, num_layers: int, length: int) -> float:
    """Of the squared norm of an example's gradient over the last layers
    (``BatchGradients.squared_norms``): of each matrix tokens with tokens, or it is formed again."""
    matrices = []
    for linear in (each for index in _last(shape, num_layers) for each in shape.linears_of(index)):
        matrices.append((linear.in_features, linear.out_features))
        worn = shape.adapter
        if worn is not None and worn.adapts(shape, linear):
            matrices += FORMS[worn.unfrozen.form].matrices(shape, linear, worn.rank)
    return sum(2.0 * length * min(length * (m + n), m * n) for m, n in matrices)


# -- of a model in training -----------------------------------------------------------------------


def trained_matrices(model: Any, num_layers: int) -> list[Any]:
    """What is trained of the linears in the last ``num_layers`` decoder layers, in all for 0:
    weights of theirs, or of adapters on them."""
    layers = list(layers_of(model))
    chosen = layers[max(0, len(layers) - num_layers) :] if num_layers else layers
    return [w for layer in chosen for w in layer.parameters() if w.requires_grad and w.dim() == 2]


def trained_elements(shape: ModelShape, adapter: Adapter | None, num_layers: int) -> int:
    """Of ``trained_matrices``."""
    indices = _last(shape, num_layers)
    if adapter is not None:
        return replace(adapter, layers=indices).num_parameters(shape)
    return sum(
        linear.in_features * linear.out_features
        for index in indices
        for linear in shape.linears_of(index)
    )


def trained_flops(
    shape: ModelShape, adapter: Adapter | None, num_layers: int
) -> Callable[[int, int], float]:
    """Of a batch: rows and their length -> FLOPs of a forward pass and the gradients of
    ``trained_matrices``."""
    setting = _trained(shape, adapter, num_layers)
    return lambda rows, length: step_flops(
        shape, replace(setting, micro_batch=rows, sequence=length)
    )


def trained_cost(work: Work, stats: PoolStats, num_layers: int) -> Cost:
    """Predicted cost of these gradients over rows like ``stats``."""
    setting = _trained(work.shape, work.adapter, num_layers)
    elements = trained_elements(work.shape, work.adapter, num_layers)
    return gradients_cost(work, stats, setting, elements)


def _trained(shape: ModelShape, adapter: Adapter | None, num_layers: int) -> MemorySetting:
    indices = _last(shape, num_layers)
    if adapter is not None:
        return MemorySetting(adapter=replace(adapter, layers=indices))
    return MemorySetting(only_layers=frozenset(indices))


def _last(shape: ModelShape, num_layers: int) -> tuple[int, ...]:
    return tuple(range(shape.num_layers))[-num_layers:]
