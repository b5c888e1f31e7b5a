"""Adam's step sizes from a random low-rank space, one a channel or one a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting, States, needs_wide_matrices, too_narrow
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Apollo(OptimizerStates):
    """Adam's step sizes from a random low-rank space, one a channel."""

    makes = "fit"
    runs = True
    source = "arXiv:2412.05270"
    worth = Worth(0.95, 0.1, "arXiv:2412.05270: on par with AdamW in pretraining")

    rank: int = 128
    refresh: int = 200
    """Every how many steps the space is drawn anew."""
    scale: float = 1.0
    """Of the update."""
    tensor_wise: bool = False
    """One step size a matrix. APOLLO-Mini is this with rank 1 and scale 11.3, the root of 128."""

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf), refresh=(1, inf), scale=(0.0, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_wide_matrices(setting, self.rank)

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        return too_narrow(shape, self.rank)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(
            states=States(
                name="apollo",
                relative=2.0,
                rank=self.rank,
                projector=False,
                step_largest=4.0,
                step_casts=3.0,
                moved=13.0,
                cpu_factor=6.0,
            ),
        )

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import projected_adam

        return projected_adam.Apollo(
            groups,
            rank=self.rank,
            refresh=self.refresh,
            scale=self.scale,
            tensor_wise=self.tensor_wise,
        )
