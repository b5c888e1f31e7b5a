"""Adapters of two narrow matrices beside each linear: what LoRA and its kin have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from thrifty.core.contracts import MemoryTechnique, Trainable
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter

if TYPE_CHECKING:
    from thrifty.costs.setting import MemorySetting
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class LowRank(Trainable):
    """y = W x + B A x, scaled, W frozen."""

    makes = "fit"
    runs = True
    learning_rate = 10.0  # thinkingmachines.ai/blog/lora, 2025: the best one is ten times that
    form: ClassVar[str] = "lora"
    start: ClassVar[str] = ""
    """What it begins as; both as in ``costs.operations.Adapter``."""
    of_peft: ClassVar[Mapping[str, Any]] = {}
    """Further options of PEFT's ``LoraConfig``."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf), alpha=(1e-3, inf))

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        return tuple(cls(adapter_dtype=dtype) for dtype in ("float32", "bfloat16"))

    @property
    def adapter(self) -> Adapter:
        targets = self.targets or None
        return Adapter(rank=self.rank, targets=targets, form=self.form, start=self.start)

    def refuses(self, setting: MemorySetting) -> str | None:
        return "a zeroth-order step needs no adapter" if setting.zeroth_order else None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        from thrifty.holding.adapters import refusal

        return refusal(self.adapter, shape)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(adapter=self.adapter, adapter_dtype=self.adapter_dtype)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.adapters import with_adapter

        return with_adapter(
            model,
            shape,
            self.adapter,
            dtype=self.adapter_dtype,
            seed=seed,
            lora_alpha=self.alpha,
            **self.of_peft,
        )
