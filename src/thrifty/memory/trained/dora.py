"""LoRA on the direction of each weight row, and its length apart.

y = (g / |W + s B A|) (W x + s B A x), s = alpha / rank, with a trained length g of each row. The
norms are made anew in every forward, out of whole matrices, and get no gradient.
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
class DoRA(Trainable):
    """LoRA on the direction of each weight row, and its length apart."""

    makes = "fit"
    searched = False
    runs = True
    source = "arXiv:2402.09353"
    worth = Worth(0.65, 0.15, "arXiv:2402.09353: 1 to 4 points above LoRA, at equal tokens")
    learning_rate = 10.0  # arXiv:2402.09353 appendix: as for LoRA, or somewhat less

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
        return Adapter(rank=self.rank, targets=self.targets or None, form="dora")

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
