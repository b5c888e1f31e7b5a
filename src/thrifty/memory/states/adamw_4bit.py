"""AdamW's moments in 4 bits, blocks of 128 sharing a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(name="adamw_4bit", absolute=1.0625, vector=8.0, step_cpu=26.0, cpu_factor=70.0)


@dataclass(frozen=True, kw_only=True)
class AdamW4bit(OptimizerStates):
    """AdamW's moments in 4 bits, blocks of 128 sharing a scale."""

    makes = "fit"
    runs = True
    needs = ("torchao",)
    source = "arXiv:2309.01507"
    worth = Worth(0.98, 0.03, "arXiv:2309.01507; 42.3 against 42.6 accuracy in torchao's README")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding.few_bit_states import adamw_4bit

        return adamw_4bit(groups)
