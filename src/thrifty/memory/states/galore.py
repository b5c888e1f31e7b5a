"""Adam in a low-rank space of each matrix's gradient, its singular vectors refreshed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting, States, needs_wide_matrices


@dataclass(frozen=True, kw_only=True)
class GaLore(MemoryTechnique):
    """Adam in a low-rank space of each matrix's gradient, its singular vectors refreshed."""

    makes = "fit"
    runs = False
    source = "arXiv:2403.03507"
    worth = Worth(0.9, 0.1, "arXiv:2403.03507: 15.64 against 15.56 perplexity at 1B")

    rank: int = 128

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_wide_matrices(setting, self.rank)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(
            setting, states=States(name="galore", relative=2.0, rank=self.rank, moved=9.0)
        )
