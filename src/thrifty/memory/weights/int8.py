"""Frozen linears in 8 bits, a scale a row (LLM.int8).

W = CB * s / 127, one float32 s an output row; each use makes the weight whole in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.contracts import WeightStorage, Worth
from thrifty.costs.setting import MemorySetting, Storage, only_frozen, widened_by_vectors


@dataclass(frozen=True, kw_only=True)
class Int8(WeightStorage):
    """Frozen linears in 8 bits, a scale a row (LLM.int8)."""

    makes = "fit"
    runs = True
    needs = ("bitsandbytes",)
    source = "arXiv:2208.07339"
    worth = Worth(1.0, 0.02, "arXiv:2208.07339 finds no loss")

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.adapter is not None and setting.adapter.form == "adalora":
            return "PEFT's AdaLoRA puts out float32 on 8-bit weights, which the next cannot read"
        return widened_by_vectors(setting) or only_frozen(setting, "int8")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        storage = Storage(name="int8", bits=8.0, row_bytes=4.0)
        return setting.changed(dtype="bfloat16", storage=storage)

    def load(self, folder: Path, device: str) -> Any:
        from thrifty.holding.few_bits import load_int8

        return load_int8(folder, device)
