"""A layer keeps its input alone and runs again in the backward."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Recompute(MemoryTechnique):
    """A layer keeps its input alone and runs again in the backward."""

    makes = "fit"
    runs = True
    source = "arXiv:1604.06174"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        return "without a backward nothing is kept" if setting.zeroth_order else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, recompute=1)
