"""Two moments a weight, in its dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import ADAMW, MemorySetting, needs_a_gradient


@dataclass(frozen=True, kw_only=True)
class AdamW(MemoryTechnique):
    """Two moments a weight, in its dtype."""

    makes = "faster"
    runs = True
    source = "arXiv:1711.05101"
    worth = Worth(1.0, 0.0, "reference")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, states=ADAMW)
