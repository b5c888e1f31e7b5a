"""Stochastic gradient descent, no state at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting, States


@dataclass(frozen=True, kw_only=True)
class SGD(MemoryTechnique):
    """Stochastic gradient descent, no state at all."""

    makes = "fit"
    runs = False
    source = "Robbins and Monro, 1951"
    worth = Worth(0.3, 0.2, "transformers need adaptive steps, arXiv:1912.03194")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, states=States(name="sgd", moved=3.0))
