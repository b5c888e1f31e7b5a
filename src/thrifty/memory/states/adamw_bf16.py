"""AdamW on bfloat16 weights, rounded at random so that small updates are not lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(name="adamw_bf16", relative=2.0, step_casts=5.75, moved=105.0)


@dataclass(frozen=True, kw_only=True)
class AdamWBF16(OptimizerStates):
    """AdamW on bfloat16 weights, rounded at random so that small updates are not lost."""

    makes = "faster"
    runs = True
    source = "arXiv:2010.06192"
    worth = Worth(1.0, 0.05, "as adamw, in bf16")
    worth_trained = Worth(
        1.1, 0.1, "gives back what trained bf16 weights lose, 0.036 of 0.037 nats once"
    )

    def refuses(self, setting: MemorySetting) -> str | None:
        if reason := needs_a_gradient(setting):
            return reason
        trained = setting.dtype if setting.adapter is None else setting.adapter_dtype
        return None if trained == "bfloat16" else f"weights in {trained} need no such rounding"

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding.adamw_rounded import RoundedAdamW

        return RoundedAdamW(groups)
