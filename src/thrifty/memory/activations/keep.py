"""Everything that the backward needs is kept."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Keep(ActivationMemory):
    """Everything that the backward needs is kept."""

    makes = "faster"
    runs = True
    shards = True
    source = "the reference"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting
