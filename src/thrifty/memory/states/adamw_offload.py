"""AdamW whose moments live on the host, and whose step runs there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import ADAMW, MemorySetting, needs_a_gradient
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class AdamWOffload(OptimizerStates):
    """AdamW whose moments live on the host, and whose step runs there."""

    makes = "fit"
    runs = True
    source = "arXiv:2101.06840"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        if reason := needs_a_gradient(setting):
            return reason
        return "there is no other place to put them" if setting.device_kind == "cpu" else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=ADAMW, states_offloaded=True)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding.host_states import HostAdamW

        return HostAdamW(groups)
