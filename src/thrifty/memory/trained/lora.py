"""Low-rank adapters on every linear of the layers, the weights frozen.

y = W x + B A x alpha / rank. PEFT keeps A and B in float32 unless told otherwise, and then keeps
a float32 copy of each adapted linear's input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from thrifty.core.contracts import MemoryTechnique, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class LoRA(MemoryTechnique):
    """Low-rank adapters on every linear of the layers, the weights frozen."""

    makes = "fit"
    runs = True
    source = "arXiv:2106.09685"
    worth = Worth(0.6, 0.15, "LoRA learns less per token, arXiv:2405.09673")

    rank: int = 16
    targets: tuple[str, ...] = ()
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf))

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        return tuple(cls(adapter_dtype=dtype) for dtype in ("float32", "bfloat16"))

    def refuses(self, setting: MemorySetting) -> str | None:
        return "a zeroth-order step needs no adapter" if setting.zeroth_order else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        adapter = Adapter(rank=self.rank, targets=self.targets or None)
        return replace(setting, adapter=adapter, adapter_dtype=self.adapter_dtype)
