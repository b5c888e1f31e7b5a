"""A layer keeps its input alone and runs again in the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Recompute(ActivationMemory):
    """A layer keeps its input alone and runs again in the backward."""

    makes = "fit"
    runs = True
    shards = True
    source = "arXiv:1604.06174"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    def refuses(self, setting: MemorySetting) -> str | None:
        return "without a backward nothing is kept" if setting.zeroth_order else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(recompute=1)

    def hold(self, model: Any) -> None:
        from thrifty.holding.recompute import recompute

        recompute(model)
