"""Lion: one moment a weight, the sign of its mean with the gradient the update.

    c = beta1 m + (1 - beta1) g
    w <- w - lr (sign(c) + weight_decay w)
    m <- beta2 m + (1 - beta2) g

with betas 0.9 and 0.99 (arXiv:2302.06675, algorithm 2).
"""

from __future__ import annotations

from typing import Any

import torch

from thrifty.holding.tensor_by_tensor import TensorByTensor, move, wide

LION_BETAS = (0.9, 0.99)


class Lion(TensorByTensor):
    """A step of ``lr`` in every coordinate."""

    def update(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        ahead, behind = LION_BETAS
        mean = wide(state["exp_avg"])
        move(parameter, mean.lerp(gradient, 1 - ahead).sign_(), group)
        state["exp_avg"].copy_(mean.lerp_(gradient, 1 - behind))
