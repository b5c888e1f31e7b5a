"""Lion's moment in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(
    name="lion_8bit",
    absolute=1.015625,
    wide_embedding=4.0,
    step_cpu=20.0,
    step_cpu_casts=1.0,
    moved=4.0,
    cpu_factor=20.0,
)


@dataclass(frozen=True, kw_only=True)
class Lion8bit(OptimizerStates):
    """Lion's moment in 8 bits."""

    makes = "fit"
    runs = True
    needs = ("bitsandbytes",)
    source = "arXiv:2302.06675"
    learning_rate = 0.3  # arXiv:2302.06675, section 5: 3 to 10 times smaller than AdamW's
    worth = Worth(0.97, 0.06, "as lion, in 8 bits")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding.few_bit_states import lion_8bit

        return lion_8bit(groups, shape)
