"""Frozen linears in 8 bits, a scale a row (LLM.int8).

W = CB * s / 127, one float32 s an output row; each use makes the weight whole in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.costs.setting import MemorySetting, Storage, only_frozen


@dataclass(frozen=True, kw_only=True)
class Int8(MemoryTechnique):
    """Frozen linears in 8 bits, a scale a row (LLM.int8)."""

    makes = "fit"
    runs = False
    needs = ("bitsandbytes",)
    source = "arXiv:2208.07339"
    worth = Worth(1.0, 0.02, "arXiv:2208.07339 finds no loss")

    def refuses(self, setting: MemorySetting) -> str | None:
        return only_frozen(setting, "int8")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        storage = Storage(name="int8", bits=8.0, row_bytes=4.0)
        return replace(setting, dtype="bfloat16", storage=storage)
