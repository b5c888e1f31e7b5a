"""Two moments a weight, in its dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import ADAMW, MemorySetting


@dataclass(frozen=True, kw_only=True)
class AdamW(MemoryTechnique):
    """Two moments a weight, in its dtype."""

    makes = "faster"
    runs = True
    source = "arXiv:1711.05101"
    worth = Worth(1.0, 0.0, "reference")

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.zeroth_order:
            return "a zeroth-order update is plain descent, without states"
        return None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, states=ADAMW)
