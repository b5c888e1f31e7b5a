"""Frozen linears in 4 bits (QLoRA's NormalFloat).

Blocks of 64 weights share a float32 maximum: 4 + 32/64 bits; with ``double`` the maxima are
stored in 8 bits, blocks of 256 of them sharing one: 4 + 8/64 + 32/(64 * 256) bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.contracts import MemoryTechnique, WeightStorage, Worth
from thrifty.costs.setting import MemorySetting, Storage, only_frozen, widened_by_vectors
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class NF4(WeightStorage):
    """Frozen linears in 4 bits (QLoRA's NormalFloat)."""

    makes = "fit"
    runs = True
    needs = ("bitsandbytes",)
    source = "arXiv:2305.14314"
    worth = Worth(1.0, 0.03, "arXiv:2305.14314 matches 16-bit LoRA")

    double: bool = True

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        return (cls(double=True), cls(double=False))

    def refuses(self, setting: MemorySetting) -> str | None:
        return widened_by_vectors(setting) or only_frozen(setting, "4 bits")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        bits = 4 + 8 / 64 + 32 / (64 * 256) if self.double else 4 + 32 / 64
        return setting.changed(dtype="bfloat16", storage=Storage(name="nf4", bits=bits))

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        if device_kind != "cpu":
            return None
        from thrifty.holding.few_bit_shapes import refuses_block

        return refuses_block(shape, "nf4")

    def load(self, folder: Path, device: str) -> Any:
        from thrifty.holding.few_bits import load_nf4

        return load_nf4(folder, device, double=self.double)
