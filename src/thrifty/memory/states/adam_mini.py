"""AdamW with one second moment a neuron or head instead of a weight.

4.025 bytes a weight in float32, measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(
    name="adam_mini",
    relative=1.0,
    edge=4.0,
    step_largest=4.0,
    step_casts=3.0,
    moved=15.0,
    cpu_factor=4.0,
)


@dataclass(frozen=True, kw_only=True)
class AdamMini(OptimizerStates):
    """AdamW with one second moment a neuron or head instead of a weight."""

    makes = "fit"
    runs = True
    source = "arXiv:2406.16793"
    worth = Worth(0.99, 0.03, "arXiv:2406.16793: on par")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import adam_mini

        return adam_mini.AdamMini(groups, shape)
