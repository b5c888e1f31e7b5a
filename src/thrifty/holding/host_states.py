"""AdamW whose moments live on the host and whose step runs there (arXiv:2101.06840).

Of one weight after the other the gradient and the weight go down, torch's fused kernel for CPUs
steps, and the weight comes back: the device holds nothing but weights and gradients, the host two
moments and a weight's copy. Pinned where the weights are on CUDA. Equal to ``torch.optim.AdamW`` on
a CPU, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from thrifty.holding.tensor_by_tensor import BETAS, EPS


class HostAdamW(torch.optim.Optimizer):
    """``groups``: each with its ``params``, a ``lr`` and a ``weight_decay``."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Weights without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = _on_host(weight, weight.device).zero_()
        assert weight.grad is not None
        there = _copied(weight, weight.device)
        adamw(
            [there],
            [_copied(weight.grad, weight.device)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )
        weight.copy_(there)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ever, but moments are not moved to where the weights are."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = (place for group in state_dict["param_groups"] for place in group["params"])
        weights = (weight for group in self.param_groups for weight in group["params"])
        for place, weight in zip(saved, weights, strict=True):
            for name, value in state_dict["state"].get(place, {}).items():
                self.state[weight][name] = _copied(value, weight.device)


def _on_host(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Of the shape, order and dtype of ``like``; pinned where it goes to and from CUDA."""
    return torch.empty_like(like, device="cpu", pin_memory=device.type == "cuda")


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return _on_host(tensor, device).copy_(tensor.detach())
