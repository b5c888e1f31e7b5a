"""One moment a weight, its sign the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient


@dataclass(frozen=True, kw_only=True)
class Lion(MemoryTechnique):
    """One moment a weight, its sign the update."""

    makes = "fit"
    runs = False
    needs = ("bitsandbytes",)
    source = "arXiv:2302.06675"
    worth = Worth(0.97, 0.05, "arXiv:2302.06675: on par, less at small batches")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, states=States(name="lion", relative=1.0, moved=5.0))
