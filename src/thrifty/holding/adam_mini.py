"""Adam-mini: Adam with one second moment a block of weights, the mean over the block.

    v <- beta2 v + (1 - beta2) mean(g g)   over a block

A block is a head of the queries and keys, an output neuron of every other matrix of a layer, a
token of the embedding and the head, and all of any other tensor (arXiv:2406.16793, algorithm 3).
Where queries and keys are one matrix with the values, its blocks are neurons, which are finer.
"""

from __future__ import annotations

from typing import Any

import torch

from thrifty.costs.shape import ModelShape
from thrifty.holding.tensor_by_tensor import (
    BETAS,
    EPS,
    TensorByTensor,
    in_a_layer,
    move,
    wide,
)

BY_HEAD = ("q_proj.weight", "k_proj.weight")
INPUT_FIRST = ("gpt2",)
"""Families whose linears are stored [in, out] (transformers' ``Conv1D``)."""


class AdamMini(TensorByTensor):
    """AdamW but for the blocks. The second moments are float32 whatever the weights are."""

    def __init__(self, groups: list[dict[str, Any]], shape: ModelShape) -> None:
        super().__init__(groups)
        self.shape = shape

    def update(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        square = in_blocks(name, gradient, self.shape).square().mean(-1, keepdim=True)
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(square)
        (first, second), step = BETAS, state["step"]
        mean = wide(state["exp_avg"]).lerp_(gradient, 1 - first)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].mul_(second).add_(square, alpha=1 - second)
        scale = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(EPS)
        direction = mean / (1 - first**step)
        in_blocks(name, direction, self.shape).div_(scale)
        move(parameter, direction, group)


def in_blocks(name: str, tensor: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """A view of a tensor that is shaped as the parameter ``name``, [num_blocks, block size]."""
    if tensor.dim() < 2:
        return tensor.view(1, -1)
    if name.endswith(BY_HEAD) and tensor.shape[0] % shape.head_dim == 0:
        return tensor.view(-1, shape.head_dim * tensor.shape[1])
    if in_a_layer(name) and shape.model_type in INPUT_FIRST:
        return tensor.mT
    return tensor.flatten(0, -2)
