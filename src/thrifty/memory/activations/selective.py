"""What matrix products and attention put out is kept, the rest is made again.

No product runs twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Selective(ActivationMemory):
    """What matrix products and attention put out is kept, the rest is made again."""

    makes = "fit"
    runs = True
    shards = True
    source = "arXiv:2205.05198"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        return "without a backward nothing is kept" if setting.zeroth_order else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(recompute=1, selective=True)

    def hold(self, model: Any) -> None:
        from thrifty.holding.recompute import recompute

        recompute(model, selective=True)
