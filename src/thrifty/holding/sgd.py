"""Plain gradient descent. torch's own is not used: its fused kernel leaves bfloat16 weights on a
CPU as they are (2.13), and its others copy the gradient for the decay."""

from __future__ import annotations

from typing import Any

import torch

from thrifty.holding.tensor_by_tensor import TensorByTensor, move


class SGD(TensorByTensor):
    """w <- w - lr (g + weight_decay w)."""

    def update(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        move(parameter, gradient, group)
