"""No gradient: the loss on both sides of a random direction (MeZO).

g = (L(w + eps z) - L(w - eps z)) / (2 eps) z, with z, standard normal, made anew from its seed.
What is stored in few bits cannot be moved by eps z.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import Trainable, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class MeZO(Trainable):
    """No gradient: the loss on both sides of a random direction (MeZO)."""

    makes = "fit"
    runs = True
    source = "arXiv:2305.17333"
    worth = Worth(0.01, 0.01, "20 to 100 times the steps, arXiv:2305.17333 section 3")
    learning_rate = 0.1

    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_ranges(self, eps=(1e-12, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.replicas > 1:
            return "devices add up gradients, and it has none"
        return None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(zeroth_order=True)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.zeroth_order import ZerothOrder

        return ZerothOrder(groups, eps=self.eps, seed=seed)
