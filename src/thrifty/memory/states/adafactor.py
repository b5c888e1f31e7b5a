"""A second moment factored into rows and columns, no first.

A float32 mean square a row and a column of each matrix; its step works in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient


@dataclass(frozen=True, kw_only=True)
class Adafactor(MemoryTechnique):
    """A second moment factored into rows and columns, no first."""

    makes = "fit"
    runs = False
    source = "arXiv:1804.04235"
    worth = Worth(0.9, 0.1, "no momentum; arXiv:1804.04235 section 9")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(
            setting,
            states=States(
                name="adafactor",
                edge=4.0,
                vector=4.0,
                step_largest=8.0,
                step_casts=2.0,
                moved=9.0,
                cpu_factor=13.0,
            ),
        )
