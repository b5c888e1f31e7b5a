"""A gradient that is used up in the backward and an estimate without one, in one step (Addax).

    w <- w - lr (alpha (g0 z + decay w) + (1 - alpha) (g1 + decay w))

g0 and z are ``zeroth_order.py``'s, g1 LOMO's; both are of the same w: the estimate is asked for
before the backward, which moves the weights, and applied after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thrifty.holding.in_backward import LOMO
from thrifty.holding.zeroth_order import ZerothOrder


class MixedOrder(LOMO):
    """``groups``: each with its ``params`` as (name, weight) pairs, a ``lr`` and a
    ``weight_decay``. Of a step first ``estimate``, then the backward, then ``step``."""

    def __init__(
        self, groups: list[dict[str, Any]], *, alpha: float, eps: float, seed: int
    ) -> None:
        super().__init__([dict(group) for group in groups])
        self._zeroth = ZerothOrder(groups, eps=eps, seed=seed, share=alpha)
        self._share = 1 - alpha
        self._one_state()

    def _one_state(self) -> None:
        """Rates and the number of steps are those of both."""
        for group, other in zip(self.param_groups, self._zeroth.param_groups, strict=True):
            group.setdefault("steps", other["steps"])
        self._zeroth.param_groups = self.param_groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._one_state()

    def estimate(self, loss: Callable[[], Any]) -> Any:
        """Of the rows that get no backward: as ``ZerothOrder.estimate``."""
        return self._zeroth.estimate(loss)

    def update(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        super().update(name, weight, gradient, {**group, "lr": group["lr"] * self._share})

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._zeroth.zero_grad(set_to_none)
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Along the direction of this step; the gradients are used up already. Raises
        FloatingPointError where one of them was not finite."""
        loss = super().step(closure)
        self._zeroth.step()
        return loss
