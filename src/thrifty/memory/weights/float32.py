"""Weights in float32.

The reference: every update counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.contracts import WeightStorage, Worth
from thrifty.costs.setting import MemorySetting, only_in_full


@dataclass(frozen=True, kw_only=True)
class Float32(WeightStorage):
    """Weights in float32."""

    makes = "faster"
    runs = True
    shards = True
    merges = True
    source = "the reference"
    worth = Worth(1.0, 0.0, "reference")

    def refuses(self, setting: MemorySetting) -> str | None:
        return only_in_full(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(dtype="float32")

    def load(self, folder: Path, device: str) -> Any:
        from thrifty.signals.models import load_model

        return load_model(folder, "float32", device)

    def load_sharded(self, folder: Path, device: str, count: int) -> Any:
        from thrifty.signals.models import load_model

        return load_model(folder, "float32", device, shards=count)
