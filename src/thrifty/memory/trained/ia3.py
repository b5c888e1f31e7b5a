"""Keys, values and the mlp's inner features, each times a trained number ((IA)3).

y = l * W x for keys and values, y = W (l * x) for the mlp's last linear; l begins as ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import MemoryTechnique, Trainable, Worth
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class IA3(Trainable):
    """Keys, values and the mlp's inner features, each times a trained number ((IA)3)."""

    makes = "fit"
    searched = False
    runs = True
    shards = True
    source = "arXiv:2205.05638"
    worth = Worth(0.2, 0.1, "made for a few dozen examples, arXiv:2205.05638; a guess beyond")
    learning_rate = 10.0  # arXiv:2205.05638 takes 3e-3

    targets: tuple[str, ...] = ()
    adapter_dtype: str = "float32"

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        return tuple(cls(adapter_dtype=dtype) for dtype in ("float32", "bfloat16"))

    def refuses(self, setting: MemorySetting) -> str | None:
        return "a zeroth-order step needs no adapter" if setting.zeroth_order else None

    @property
    def _adapter(self) -> Adapter:
        return Adapter(rank=1, targets=self.targets or None, form="ia3")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(adapter=self._adapter, adapter_dtype=self.adapter_dtype)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.adapters import with_adapter

        return with_adapter(model, shape, self._adapter, dtype=self.adapter_dtype, seed=seed)

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        from thrifty.holding.adapters import refusal

        return refusal(self._adapter, shape)
