"""No gradient: the loss on both sides of a random direction (MeZO).

g = (L(w + eps z) - L(w - eps z)) / (2 eps) z, with z, standard normal, made anew from its seed.
The weights themselves are moved by eps z, eps 1e-3: what is stored in few bits cannot follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class MeZO(MemoryTechnique):
    """No gradient: the loss on both sides of a random direction (MeZO)."""

    makes = "fit"
    runs = False
    source = "arXiv:2305.17333"
    worth = Worth(0.01, 0.01, "20 to 100 times the steps, arXiv:2305.17333 section 3")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, zeroth_order=True)
