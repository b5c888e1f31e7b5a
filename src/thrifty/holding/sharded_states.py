"""The states of an optimizer whose weights are cut over ranks: saved whole, so that any number of
ranks can go on, and cut again as the weights are when they are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def save_whole(optimizer: Any) -> None:
    """Have ``state_dict()`` of a ``torch.optim.Optimizer`` give whole tensors, on the host, and
    ``load_state_dict()`` take them. All ranks ask for the first together."""
    optimizer.register_state_dict_post_hook(_gathered)
    optimizer.register_load_state_dict_pre_hook(_cut)


def _gathered(optimizer: Any, found: dict[str, Any]) -> dict[str, Any]:
    states = {
        number: {name: _whole(value) for name, value in state.items()}
        for number, state in found["state"].items()
    }
    return {**found, "state": states}


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _cut(optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = {
        number: {name: _like(value, weights[number]) for name, value in state.items()}
        for number, state in given["state"].items()
    }
    return {**given, "state": states}


def _like(value: Any, weight: Any) -> Any:
    """Cut as ``weight`` is, where it has a number for each of the weight's."""
    if not (torch.is_tensor(value) and isinstance(weight, DTensor)):
        return value
    if isinstance(value, DTensor) or value.shape != weight.shape:
        return value
    mesh = weight.device_mesh
    value = value.to(weight.to_local().device)
    return distribute_tensor(value, mesh, weight.placements, src_data_rank=None)
