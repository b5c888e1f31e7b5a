"""All weights are trained."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.core.contracts import Trainable, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Full(Trainable):
    """All weights are trained."""

    makes = "faster"
    runs = True
    shards = True
    switches = True
    source = "the reference"
    worth = Worth(1.0, 0.0, "reference")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting
