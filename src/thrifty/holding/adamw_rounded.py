"""AdamW on bfloat16 weights whose new values are rounded at random (arXiv:2010.06192).

The arithmetic is float32, as that of torch's fused AdamW. The moments are bfloat16; the second is
rounded at random as well, since to nearest it stands still: a step changes it by a thousandth.
"""

from __future__ import annotations

from typing import Any

import torch

from thrifty.holding.noise import generator_of
from thrifty.holding.rounding import round_at_random
from thrifty.holding.tensor_by_tensor import BETAS, EPS, TensorByTensor, moved, named, wide


class RoundedAdamW(TensorByTensor):
    """The noise is a function of torch's seed when it was made, of the weight's name and the step.
    Raises ValueError where a weight is no bfloat16."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, seed=torch.initial_seed())
        for group in self.param_groups:
            for name, parameter in named(group):
                if parameter.dtype != torch.bfloat16:
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    raise ValueError(
                        f"{name} is {dtype}, which adamw_bf16 has no rounding for\n"
                        "hint: load the weights in bfloat16, or use adamw"
                    )

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
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        (first, second), step = BETAS, state["step"]
        noise = generator_of(group["seed"], name, step, parameter.device)
        square = wide(state["exp_avg_sq"]).mul_(second)
        square.addcmul_(gradient, gradient, value=1 - second)
        state["exp_avg_sq"].copy_(round_at_random(square, noise))
        scale = square.div_(1 - second**step).sqrt_().add_(EPS).mul_(1 - first**step)
        mean = wide(state["exp_avg"]).lerp_(gradient, 1 - first)
        state["exp_avg"].copy_(mean)
        parameter.copy_(round_at_random(moved(parameter, mean.div_(scale), group), noise))
