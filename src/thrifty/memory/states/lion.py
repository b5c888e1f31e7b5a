"""One moment a weight, its sign the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(
    name="lion",
    relative=1.0,
    step_largest=4.0,
    step_casts=3.0,
    moved=13.0,
    cpu_factor=4.0,
)


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerStates):
    """One moment a weight, its sign the update."""

    makes = "fit"
    runs = True
    source = "arXiv:2302.06675"
    learning_rate = 0.3  # arXiv:2302.06675, section 5: 3 to 10 times smaller than AdamW's
    worth = Worth(0.97, 0.05, "arXiv:2302.06675: on par, less at small batches")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import lion

        return lion.Lion(groups)
