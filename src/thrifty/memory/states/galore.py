"""Adam in a low-rank space of each matrix's gradient, its singular vectors refreshed."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting, States, needs_wide_matrices, too_narrow
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class GaLore(OptimizerStates):
    """Adam in a low-rank space of each matrix's gradient, its singular vectors refreshed."""

    makes = "fit"
    runs = True
    source = "arXiv:2403.03507"
    worth = Worth(0.9, 0.1, "arXiv:2403.03507: 15.64 against 15.56 perplexity at 1B")

    rank: int = 128
    refresh: int = 200
    """Every how many steps the singular vectors are found anew."""
    scale: float = 0.25
    """Of the update: alpha of the paper."""

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf), refresh=(1, inf), scale=(0.0, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_wide_matrices(setting, self.rank)

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        return too_narrow(shape, self.rank)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(
            states=States(
                name="galore",
                relative=2.0,
                rank=self.rank,
                step_largest=4.0,
                step_casts=3.0,
                moved=9.0,
                cpu_factor=9.0,
            ),
        )

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import projected_adam

        return projected_adam.GaLore(groups, rank=self.rank, refresh=self.refresh, scale=self.scale)
