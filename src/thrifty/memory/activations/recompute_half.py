"""Every second layer runs again in the backward, the others keep all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class RecomputeHalf(MemoryTechnique):
    """Every second layer runs again in the backward, the others keep all."""

    makes = "fit"
    runs = False
    source = "arXiv:1604.06174"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        return "without a backward nothing is kept" if setting.zeroth_order else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, recompute=2)
