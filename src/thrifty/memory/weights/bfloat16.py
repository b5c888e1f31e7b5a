"""Weights in bfloat16, half the bytes.

Trained themselves they lose updates smaller than 1/256 of a weight; under an adapter they are
only read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class BFloat16(MemoryTechnique):
    """Weights in bfloat16, half the bytes."""

    makes = "faster"
    runs = True
    source = "arXiv:1905.12322"
    worth = Worth(1.0, 0.0, "read only, bf16 is what most models come in")
    worth_trained = Worth(0.9, 0.1, "plain bf16 lost 0.04 of 1.01 nats in a small run, docs/log.md")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, dtype="bfloat16")
