"""A layer keeps its input alone and runs again in the backward; every ``every``-th does, the others
keep all."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Recompute(ActivationMemory):
    """A layer keeps its input alone and runs again in the backward."""

    makes = "fit"
    runs = True
    shards = True
    source = "arXiv:1604.06174"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    every: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, every=(1, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        return "without a backward nothing is kept" if setting.zeroth_order else None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        if self.every <= shape.num_layers:
            return None
        return f"there is no {self.every}-th of {shape.num_layers} layers"

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(recompute=self.every)

    def hold(self, model: Any) -> None:
        from thrifty.holding.recompute import recompute

        recompute(model, every=self.every)
