"""A layer keeps its input alone, on the host, and runs again in the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class RecomputeOffload(ActivationMemory):
    """A layer keeps its input alone, on the host, and runs again in the backward."""

    makes = "fit"
    runs = True
    source = "arXiv:1604.06174; Unsloth's offloaded checkpoints"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.zeroth_order:
            return "without a backward nothing is kept"
        return "there is no other place to put them" if setting.device_kind == "cpu" else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(recompute=1, offload=True)

    def hold(self, model: Any) -> None:
        from thrifty.holding.host_activations import offload
        from thrifty.holding.recompute import recompute

        recompute(model)
        offload(model)
