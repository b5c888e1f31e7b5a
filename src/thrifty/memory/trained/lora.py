"""Low-rank adapters on every linear of the layers, the weights frozen.

y = W x + B A x alpha / rank. PEFT keeps A and B in float32 unless told otherwise, and then keeps
a float32 copy of each adapted linear's input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from thrifty.core.contracts import MemoryTechnique, Trainable, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class LoRA(Trainable):
    """Low-rank adapters on every linear of the layers, the weights frozen."""

    makes = "fit"
    runs = True
    source = "arXiv:2106.09685"
    worth = Worth(0.6, 0.15, "LoRA learns less per token, arXiv:2405.09673")
    learning_rate = 10.0  # thinkingmachines.ai/blog/lora, 2025: the best one is ten times that

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf), alpha=(1e-3, inf))

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        return tuple(cls(adapter_dtype=dtype) for dtype in ("float32", "bfloat16"))

    def refuses(self, setting: MemorySetting) -> str | None:
        return "a zeroth-order step needs no adapter" if setting.zeroth_order else None

    @property
    def _adapter(self) -> Adapter:
        return Adapter(rank=self.rank, targets=self.targets or None)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, adapter=self._adapter, adapter_dtype=self.adapter_dtype)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.adapters import with_adapter

        return with_adapter(
            model, shape, self._adapter, dtype=self.adapter_dtype, seed=seed, lora_alpha=self.alpha
        )

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        from thrifty.holding.adapters import refusal

        return refusal(self._adapter, shape)
