"""Plain gradient descent inside the backward: no gradient outlives its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(name="lomo", moved=3.0)


@dataclass(frozen=True, kw_only=True)
class LOMO(OptimizerStates):
    """Plain gradient descent inside the backward: no gradient outlives its layer."""

    makes = "fit"
    runs = True
    source = "arXiv:2306.09782"
    learning_rate = 300.0  # as sgd
    worth = Worth(0.3, 0.2, "as sgd")

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.zeroth_order:
            return needs_a_gradient(setting)
        if setting.gradient_accumulation_steps > 1:
            return "a gradient that is used up at once cannot be accumulated"
        if setting.replicas > 1:
            return "a gradient that is used up at once cannot be added to those of other devices"
        return None if setting.adapter is None else "an adapter's gradients are small as they are"

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES, in_backward=True)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import in_backward

        return in_backward.LOMO(groups)
