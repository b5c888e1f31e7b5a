"""Weights in float32.

The reference: every update counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Float32(MemoryTechnique):
    """Weights in float32."""

    makes = "faster"
    runs = True
    source = "the reference"
    worth = Worth(1.0, 0.0, "reference")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, dtype="float32")
