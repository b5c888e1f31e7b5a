"""LoRA of which one matrix alone is trained, so that no input is kept.

y = W x + B A x alpha / rank, A as it began. Then x is not kept, only A x, rank wide; and half of
the adapter has a gradient and states.
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
class LoRAFA(Trainable):
    """LoRA of which one matrix alone is trained, so that no input is kept."""

    makes = "fit"
    searched = False
    runs = True
    source = "arXiv:2308.03303"
    worth = Worth(0.55, 0.15, "arXiv:2308.03303: LoRA less 0 to 1 points")
    learning_rate = 10.0  # arXiv:2308.03303 searches where LoRA does

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
        return Adapter(rank=self.rank, targets=self.targets or None, form="lora_fa")

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
