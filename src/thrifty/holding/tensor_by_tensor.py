"""The loop that optimizers of our own share: one tensor is updated after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

BETAS = (0.9, 0.999)
EPS = 1e-8
"""Adam's, which transformers takes too."""


class TensorByTensor(torch.optim.Optimizer, ABC):
    """An optimizer whose update of one tensor knows nothing of the others.

    ``groups`` have their ``params`` as (name, parameter) pairs, a ``lr`` and a ``weight_decay``;
    ``more`` is kept beside them, and is saved with them.
    """

    def __init__(self, groups: list[dict[str, Any]], **more: Any) -> None:
        super().__init__(groups, more)
        keep_dtypes(self)

    @abstractmethod
    def update(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        """One step of one tensor in place; ``state["step"]`` counts it already. ``gradient`` is
        float32 where the weight is narrower."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in named(group):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                self.update(name, parameter, wide(parameter.grad), state, group)
        return loss


def named(group: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of an optimizer's group by name."""
    return zip(group["param_names"], group["params"], strict=True)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 where it is narrower; itself where it is not."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def adam_direction(
    gradient: torch.Tensor, state: dict[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    """m / (sqrt(v) + eps) of Adam, both without their bias towards zero, after ``gradient`` went
    into the moments, which ``state`` keeps in ``dtype``."""
    if "exp_avg" not in state:
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(gradient, dtype=dtype)
    (first, second), step = BETAS, state["step"]
    mean = wide(state["exp_avg"]).lerp_(gradient, 1 - first)
    square = wide(state["exp_avg_sq"]).mul_(second)
    square.addcmul_(gradient, gradient, value=1 - second)
    state["exp_avg"].copy_(mean)
    state["exp_avg_sq"].copy_(square)
    scale = (square / (1 - second**step)).sqrt_().add_(EPS).mul_(1 - first**step)
    return torch.div(mean, scale, out=scale)


def moved(parameter: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """(1 - lr weight_decay) parameter - lr direction: ``parameter`` itself, changed in place, or
    where it is narrower than float32 a copy that is still to be rounded."""
    there = wide(parameter).mul_(1 - group["lr"] * group["weight_decay"])
    return there.sub_(direction, alpha=group["lr"])


def move(parameter: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> None:
    """``moved``, and rounded to nearest."""
    parameter.copy_(moved(parameter, direction, group))


def keep_dtypes(optimizer: torch.optim.Optimizer) -> None:
    """Have ``load_state_dict`` leave states in the dtype in which they were saved; torch casts them
    to their weight's, which rounds what is float32 beside bfloat16 weights."""
    saved: dict[str, Any] = {}

    def remember(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        saved.update(state_dict)

    def restore(optimizer: torch.optim.Optimizer) -> None:
        places = [place for group in saved["param_groups"] for place in group["params"]]
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            for key, value in saved["state"].get(place, {}).items():
                if torch.is_tensor(value):
                    # A copy: the next step works in place.
                    optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
        saved.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)


def in_a_layer(name: str) -> bool:
    """Whether a parameter is one of a layer's, which have the layer's number in their names; the
    embedding, the head and the norm between are not."""
    return any(part.isdecimal() for part in name.split("."))
