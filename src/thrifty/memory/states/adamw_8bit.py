"""AdamW's moments in 8 bits, blocks of 256 sharing a scale.

2 (1 + 4/256) bytes an element; the embedding's stay float32, as HF's Trainer has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(
    name="adamw_8bit",
    absolute=2.03125,
    wide_embedding=8.0,
    step_cpu=20.0,
    step_cpu_casts=1.0,
    cpu_factor=35.0,
)


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(OptimizerStates):
    """AdamW's moments in 8 bits, blocks of 256 sharing a scale."""

    makes = "fit"
    runs = True
    needs = ("bitsandbytes",)
    source = "arXiv:2110.02861"
    worth = Worth(1.0, 0.02, "arXiv:2110.02861 matches 32-bit")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding.few_bit_states import adamw_8bit

        return adamw_8bit(groups, shape)
