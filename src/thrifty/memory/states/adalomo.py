"""Adafactor's factored moments inside the backward: no gradient outlives its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(
    name="adalomo",
    edge=4.0,
    vector=4.0,
    step_largest=8.0,
    step_casts=1.0,
    moved=9.0,
    cpu_factor=13.0,
)


@dataclass(frozen=True, kw_only=True)
class AdaLomo(OptimizerStates):
    """Adafactor's factored moments inside the backward: no gradient outlives its layer."""

    makes = "fit"
    runs = True
    source = "arXiv:2310.10195"
    learning_rate = 25.0  # relative to a weight's size; arXiv:2310.10195 takes 5e-4 beside 2e-5
    worth = Worth(0.9, 0.1, "arXiv:2310.10195: on par with AdamW in instruction tuning")

    def refuses(self, setting: MemorySetting) -> str | None:
        if reason := needs_a_gradient(setting):
            return reason
        if setting.gradient_accumulation_steps > 1:
            return "a gradient that is used up at once cannot be accumulated"
        if setting.replicas > 1:
            return "a gradient that is used up at once cannot be added to those of other devices"
        return None if setting.adapter is None else "an adapter's gradients are small as they are"

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES, in_backward=True)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import in_backward

        return in_backward.AdaLomo(groups)
