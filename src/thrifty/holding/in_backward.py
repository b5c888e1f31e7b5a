"""Updates inside the backward: each weight moves as soon as its gradient is there, which then goes.

One gradient lives at a time. A weight that is used several times, as a tied one, gets the sum of
its gradients. As their norm is known only at the end, they are clipped by that of the step before;
the first step is not clipped.

    LOMO       w <- w - lr (g + weight_decay w)                          arXiv:2306.09782

    AdaLomo    v <- beta v + (1 - beta) (g^2 + 1e-30),  beta = 1 - t^-0.8,  kept as row and column
               means, v = row column^T / mean(row);  u = g / sqrt(v)
               w <- (1 - lr r weight_decay) w - lr r u / max(1, rms(u)),  r = max(1e-3, rms(w))
                                                                         arXiv:2310.10195

AdaLomo's rate is relative to the weights' size: an update moves a matrix by at most lr of its rms,
which at the rates of large models is less than half of what bfloat16 tells apart. There new values
are rounded at random (``rounding.py``); to nearest most updates would be lost.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from thrifty.holding.noise import generator_of
from thrifty.holding.rounding import round_at_random
from thrifty.holding.tensor_by_tensor import keep_dtypes, named, wide


class UpdatedInBackward(torch.optim.Optimizer, ABC):
    """``groups``: each with its ``params`` as (name, weight) pairs, a ``lr`` and a
    ``weight_decay``. What is random in an update is a function of torch's seed when it was made, of
    the weight's name and the step."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"norm": 0.0, "seed": torch.initial_seed()})
        keep_dtypes(self)
        self.max_grad_norm = 0.0
        """Of all gradients together; 0: they are not clipped."""
        self._squares = 0.0
        self._hooks = [
            weight.register_post_accumulate_grad_hook(partial(self._use_up, number, name))
            for number, group in enumerate(self.param_groups)
            for name, weight in named(group)
        ]

    @abstractmethod
    def update(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        """One step of one tensor in place."""

    @property
    def norm(self) -> float:
        """Of the gradients of the step before, before they were clipped."""
        return float(self.param_groups[0]["norm"])

    @torch.no_grad()
    def _use_up(self, number: int, name: str, weight: torch.Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        at_least = torch.promote_types(gradient.dtype, torch.float32)
        self._squares += float(torch.linalg.vector_norm(gradient, dtype=at_least)) ** 2
        if not math.isfinite(self._squares):
            return
        if 0 < self.max_grad_norm < self.norm:
            gradient.mul_(self.max_grad_norm / self.norm)
        self.update(name, weight, gradient, self.param_groups[number])

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The end of a step, whose updates are done. Raises FloatingPointError where a gradient was
        not finite: neither its weight nor any after it was updated."""
        loss = None if closure is None else closure()
        norm, self._squares = math.sqrt(self._squares), 0.0
        if not math.isfinite(norm):
            raise FloatingPointError(
                "a gradient is not finite; it was not used, but those before it in the backward "
                "were\nhint: the last checkpoint is good; go on from it at a lower learning rate"
            )
        for group in self.param_groups:
            group["norm"] = norm
        return loss

    def detach(self) -> None:
        """Leave gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()


class LOMO(UpdatedInBackward):
    def update(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        if group["weight_decay"]:
            gradient.add_(weight, alpha=group["weight_decay"])
        weight.add_(gradient, alpha=-group["lr"])


class AdaLomo(UpdatedInBackward):
    def update(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        state, gradient = self.state[weight], wide(gradient)
        state["step"] = state.get("step", 0) + 1
        direction = self._root_inverse(state, gradient).mul_(gradient)
        direction.div_(_rms(direction).clamp_(min=1.0))
        there = wide(weight)
        rate = group["lr"] * max(1e-3, float(_rms(there)))
        there.mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)
        if weight.dtype == torch.bfloat16:
            del gradient, direction  # no more than was held before is held now
            noise = generator_of(group["seed"], name, state["step"], weight.device)
            there = round_at_random(there, noise)
        weight.copy_(there)

    def _root_inverse(self, state: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor:
        """1 / sqrt(v), after ``gradient`` went into v."""
        squares = gradient.square().add_(1e-30)
        share = state["step"] ** -0.8  # of the new gradient
        if gradient.dim() < 2:
            return _blended(state, "square", squares, share).rsqrt()
        row = _blended(state, "row", squares.mean(dim=-1), share)
        column = _blended(state, "column", squares.mean(dim=-2), share)
        relative = row / row.mean(dim=-1, keepdim=True)
        return relative.rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def _blended(state: dict[str, Any], key: str, new: torch.Tensor, share: float) -> torch.Tensor:
    if key not in state:
        state[key] = torch.zeros_like(new)
    kept: torch.Tensor = state[key].lerp_(new, share)
    return kept


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())
