"""LoRA that begins as the main singular directions of the weights.

W = U S V': B A begins as its first ``rank`` singular directions, and the frozen weights are what is
left, so that the model is the same. What is saved is LoRA of twice the rank on the weights as they
were, for stock libraries: W + s B A - s B0 A0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from thrifty.core.contracts import MemoryTechnique, Trainable, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class PiSSA(Trainable):
    """LoRA that begins as the main singular directions of the weights."""

    makes = "fit"
    runs = True
    searched = False  # it holds a step as LoRA does
    source = "arXiv:2404.02948"
    worth = Worth(0.65, 0.15, "arXiv:2404.02948: 4 to 5 points above LoRA on GSM8K")
    learning_rate = 1.0  # arXiv:2404.02948: the rate of full fine-tuning, 2e-5

    rank: int = 16
    alpha: float = 16.0
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
        return Adapter(rank=self.rank, targets=self.targets or None, start="pissa")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return replace(setting, adapter=self._adapter, adapter_dtype=self.adapter_dtype)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.adapters import with_adapter

        return with_adapter(
            model,
            shape,
            self._adapter,
            dtype=self.adapter_dtype,
            seed=seed,
            lora_alpha=self.alpha,
            init_lora_weights="pissa",
        )

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        from thrifty.holding.adapters import refusal

        return refusal(self._adapter, shape)

    def save(self, model: Any, folder: Path) -> bool:
        from thrifty.holding.low_rank_start import save_on_the_base

        save_on_the_base(model, folder)
        return True
