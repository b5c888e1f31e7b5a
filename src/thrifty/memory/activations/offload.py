"""What is kept waits on the host and comes back for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Offload(ActivationMemory):
    """What is kept waits on the host and comes back for the backward."""

    makes = "fit"
    runs = True
    source = "torch.autograd.graph.save_on_cpu"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.zeroth_order:
            return "without a backward nothing is kept"
        return "there is no other place to put them" if setting.device_kind == "cpu" else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(offload=True)

    def hold(self, model: Any) -> None:
        from thrifty.holding.host_activations import offload

        offload(model)
