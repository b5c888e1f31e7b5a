"""GaLore in few bits, its singular vectors refreshed ever less often where they stand still.

The projector in 4 or 8 bits, 1/64 of a byte an element for its scales, and the moments in 8, of all
else too: 2 (1 + 4/256) bytes. The paper's weights in 8 bits are not among this.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting, States, needs_wide_matrices, too_narrow
from thrifty.costs.shape import ModelShape

SCALE = 4 / 256
"""Bytes an element, of its block's float32 scale."""


@dataclass(frozen=True, kw_only=True)
class QGaLore(OptimizerStates):
    """GaLore in few bits, its singular vectors refreshed ever less often where they stand still."""

    makes = "fit"
    runs = True
    searched = False
    needs = ("bitsandbytes",)
    source = "arXiv:2407.08296"
    worth = Worth(0.88, 0.1, "arXiv:2407.08296: within 1% of GaLore's perplexity")

    rank: int = 128
    refresh: int = 200
    """Every how many steps the singular vectors are found anew, to begin with."""
    settled: float = 0.9
    """The similarity of a space to the one before from which on that interval doubles."""
    bits: int = 4
    """Of the projector, 4 or 8."""
    scale: float = 0.25
    """Of the update: alpha of the paper."""

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf), refresh=(1, inf), scale=(0.0, inf))
        check_ranges(self, settled=(0.0, 1.0))
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, not {self.bits}\nhint: the default is 4")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_wide_matrices(setting, self.rank)

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        return too_narrow(shape, self.rank)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(
            states=States(
                name="q_galore",
                absolute=2 * (1 + SCALE),
                vector=8.0,
                rank=self.rank,
                low=(1 + SCALE, self.bits / 8 + SCALE),
                step_largest=13.0,
                step_casts=1.0,
                moved=9.0,
                cpu_factor=30.0,
            ),
        )

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import few_bit_galore

        return few_bit_galore.QGaLore(
            groups,
            rank=self.rank,
            refresh=self.refresh,
            scale=self.scale,
            bits=self.bits,
            settled=self.settled,
        )
