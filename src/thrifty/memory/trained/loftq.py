"""LoRA that begins as what 4 bits lose of the weights.

s B A begins as the first ``rank`` singular directions of W - Q, Q the weights as they are stored:
one round of the paper's, on NF4 or int8 weights as any other adapter finds them. W is read from the
base model's files again. PEFT's own takes a GPU.
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
class LoftQ(Trainable):
    """LoRA that begins as what 4 bits lose of the weights."""

    makes = "fit"
    runs = True
    searched = False  # it holds a step as LoRA does
    source = "arXiv:2310.08659"
    worth = Worth(0.62, 0.15, "as LoRA; arXiv:2310.08659 gains most at 2 bits")
    learning_rate = 10.0  # arXiv:2310.08659 searches where LoRA does

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
        return Adapter(rank=self.rank, targets=self.targets or None, start="loftq")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, adapter=self._adapter, adapter_dtype=self.adapter_dtype)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.adapters import with_adapter
        from thrifty.holding.low_rank_start import begin_with_what_is_lost

        adapter, dtype = self._adapter, self.adapter_dtype
        found = with_adapter(model, shape, adapter, dtype=dtype, seed=seed, lora_alpha=self.alpha)
        begin_with_what_is_lost(found)
        return found

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        from thrifty.holding.adapters import refusal

        return refusal(self._adapter, shape)
