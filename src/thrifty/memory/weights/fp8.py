"""Frozen linears in 8-bit floating point (e4m3), a scale a row.

W = s q, one float32 s an output row; a weight is off by 1/16 of itself at most. Each use makes the
weight whole in bf16, so that it takes no hardware of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.contracts import WeightStorage, Worth
from thrifty.costs.setting import MemorySetting, Storage, only_frozen


@dataclass(frozen=True, kw_only=True)
class FP8(WeightStorage):
    """Frozen linears in 8-bit floating point (e4m3), a scale a row."""

    makes = "fit"
    runs = True
    searched = False  # int8 takes the same bytes
    source = "arXiv:2209.05433"
    worth = Worth(1.0, 0.02, "arXiv:2209.05433 finds no loss")

    def refuses(self, setting: MemorySetting) -> str | None:
        adapter = setting.adapter
        if adapter is not None and (adapter.form == "dora" or adapter.start == "loftq"):
            return "it looks at the weights through PEFT, which cannot read fp8"
        return only_frozen(setting, "fp8")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        storage = Storage(name="fp8", bits=8.0, row_bytes=4.0)
        return setting.changed(dtype="bfloat16", storage=storage)

    def load(self, folder: Path, device: str) -> Any:
        from thrifty.holding.float8 import load_float8

        return load_float8(folder, device)
