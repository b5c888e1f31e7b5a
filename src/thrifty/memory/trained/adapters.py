"""Bottleneck adapters beside the MLP of each layer, left as a wider MLP of a stock model.

y = mlp(x) + U (act(G x) * (D x)) with the MLP's own activation, or U act(D x) where it has no gate:
the parallel form of arXiv:2110.04366, which does better there than the one in sequence of
arXiv:1902.00751. U begins as zeros. That is ``rank`` more inner features of the MLP, so that a run
leaves a plain model whose intermediate size is as much larger; checkpoints hold G, D and U alone.
The features have no bias; where the MLP has one, theirs are zeros.

Limits: no experts. The model that is left is made of the base model's files, in the dtype that its
weights had in training (bfloat16 where they were in fewer bits), to which adapters are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from thrifty.core.contracts import MemoryTechnique, Trainable, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Adapters(Trainable):
    """Bottleneck adapters beside the MLP of each layer, left as a wider MLP of a stock model."""

    makes = "fit"
    searched = False  # at LoRA's worth, which is a guess, its fewer bytes would often win
    runs = True
    source = "arXiv:2110.04366; arXiv:1902.00751"
    worth = Worth(0.6, 0.2, "a guess: as LoRA, beside which arXiv:2110.04366 finds it no worse")
    learning_rate = 10.0  # a judgement, as LoRA; arXiv:1902.00751 searches 3e-5 to 3e-3

    rank: int = 64
    """Inner features beside the MLP's own, of each layer."""
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_ranges(self, rank=(1, inf))

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        return tuple(cls(adapter_dtype=dtype) for dtype in ("float32", "bfloat16"))

    @property
    def _adapter(self) -> Adapter:
        return Adapter(rank=self.rank, form="bottleneck")

    def refuses(self, setting: MemorySetting) -> str | None:
        return "a zeroth-order step needs no adapter" if setting.zeroth_order else None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        if shape.experts is not None:
            return f"{shape.model_type} has experts, and no one MLP that could be made wider"
        if self.rank > shape.hidden_size:
            return f"rank {self.rank} is no bottleneck of a model {shape.hidden_size} wide"
        return None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(adapter=self._adapter, adapter_dtype=self.adapter_dtype)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.bottleneck import with_bottlenecks

        if reason := self.refuses_model(shape, "cpu"):
            raise ValueError(f"{reason}\nhint: a smaller rank, or lora")
        return with_bottlenecks(model, shape, self.rank, dtype=self.adapter_dtype, seed=seed)

    def restore(self, model: Any, folder: Path) -> bool:
        from thrifty.holding.bottleneck import restore

        restore(model, folder)
        return True

    def publish(self, checkpoint: Path, folder: Path, base: Path) -> bool:
        from thrifty.holding.wider_mlp import publish

        publish(checkpoint, base, folder)
        return True
