"""Lion's moment in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient


@dataclass(frozen=True, kw_only=True)
class Lion8bit(MemoryTechnique):
    """Lion's moment in 8 bits."""

    makes = "fit"
    runs = False
    needs = ("bitsandbytes",)
    source = "arXiv:2302.06675"
    worth = Worth(0.97, 0.06, "as lion, in 8 bits")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(
            setting,
            states=States(
                name="lion_8bit", absolute=1.015625, wide_embedding=4.0, moved=4.0, cpu_factor=20.0
            ),
        )
