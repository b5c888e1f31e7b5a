"""Adam's step sizes from a random low-rank space, one a channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting, States, needs_wide_matrices


@dataclass(frozen=True, kw_only=True)
class Apollo(MemoryTechnique):
    """Adam's step sizes from a random low-rank space, one a channel."""

    makes = "fit"
    runs = False
    source = "arXiv:2412.05270"
    worth = Worth(0.95, 0.1, "arXiv:2412.05270: on par with AdamW in pretraining")

    rank: int = 128

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_wide_matrices(setting, self.rank)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(
            setting,
            states=States(name="apollo", relative=2.0, rank=self.rank, projector=False, moved=9.0),
        )
