"""An adapter of the memory plan on a real model, checked against the model's shape first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.costs.adapted import scales_input
from thrifty.signals.adapters import adapted, adapter_weights, freeze_inputs, peft_config

if TYPE_CHECKING:
    from thrifty.costs.operations import Adapter
    from thrifty.costs.shape import ModelShape


def with_adapter(
    model: Any, shape: ModelShape, adapter: Adapter, *, dtype: str, seed: int, **options: Any
) -> Any:
    """``model`` with the adapter on it, its weights of ``dtype``; ``options``: of PEFT's
    configuration.

    Raises ValueError where the model's shape refuses it.
    """
    import torch

    if reason := refusal(adapter, shape):
        raise ValueError(f"{reason}\nhint: a smaller rank, or other targets")
    scaled = {linear.name for linear in adapter.linears(shape) if scales_input(shape, linear)}
    config = peft_config(adapter, adapter.names(shape), sorted(scaled), **options)
    found = adapted(model, config, seed)
    if adapter.form == "lora_fa":
        freeze_inputs(found)
    for weight in adapter_weights(found):
        weight.data = weight.data.to(getattr(torch, dtype))
    return found


def load_adapter(model: Any, folder: Path) -> None:
    """Have the adapter on ``model`` be the one that was saved in ``folder``."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def refusal(adapter: Adapter, shape: ModelShape) -> str | None:
    """Why an adapter cannot be put on a model of this shape: a matrix is too small for its rank, or
    nothing is adapted. Raises ValueError where its targets name no linear of the model."""
    linears = adapter.linears(shape)
    if not linears:
        return f"no layer of {shape.model_type} has one of {', '.join(adapter.names(shape))}"
    if adapter.form == "ia3":  # vectors, which have no rank
        return None
    small = min(linears, key=lambda each: min(each.in_features, each.out_features))
    if adapter.rank <= min(small.in_features, small.out_features):
        return None
    return (
        f"rank {adapter.rank} is more than {small.name} has, which is "
        f"{small.out_features} x {small.in_features}"
    )
