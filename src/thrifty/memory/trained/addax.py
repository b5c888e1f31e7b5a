"""Short rows by their gradient, long ones by the loss on both sides of a random direction (Addax).

    w <- w - lr (alpha g0 z + (1 - alpha) g1)

g1 is the gradient of the short rows, used up in the backward as by LOMO; g0 = (L(w + eps z) - L(w -
eps z)) / (2 eps) is of the long ones, as MeZO's, which keep no activations. A row of a batch is two
packs: one of ``short`` tokens, of documents no longer than that, and one of the plan's length, of
the others (of all where there are no others). Each kind goes through its own epochs, as the paper
draws both from sets of their own.
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
class Addax(Trainable):
    """Short rows by their gradient, long ones by losses beside the weights (Addax)."""

    makes = "fit"
    runs = True
    searched = False  # which rows are short is not known where plans are compared
    source = "arXiv:2410.06441"
    worth = Worth(0.5, 0.3, "15 times as fast as mezo on OPT-13B, arXiv:2410.06441; beside lomo's")

    short: int = 256
    """Tokens up to which a row is short, and of their packs."""
    alpha: float = 1e-3
    """Weight of what is estimated without a gradient."""
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_ranges(self, short=(1, inf), alpha=(0.0, 1.0), eps=(1e-12, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.replicas > 1 or setting.num_devices > 1:
            return "devices add up gradients, and its long rows have none"
        if self.short > setting.sequence:
            return (
                f"rows of {self.short} tokens are short to it, of {setting.sequence} that a pack "
                "has; addax takes a smaller `short`"
            )
        return None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(short=self.short)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.mixed_order import MixedOrder

        return MixedOrder(groups, alpha=self.alpha, eps=self.eps, seed=seed)
