"""Weights in bfloat16, half the bytes.

Trained themselves they lose updates smaller than 1/256 of a weight; under an adapter they are
only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.contracts import WeightStorage, Worth
from thrifty.costs.setting import MemorySetting, only_in_full


@dataclass(frozen=True, kw_only=True)
class BFloat16(WeightStorage):
    """Weights in bfloat16, half the bytes."""

    makes = "faster"
    runs = True
    shards = True
    merges = True
    source = "arXiv:1905.12322"
    worth = Worth(1.0, 0.0, "read only, bf16 is what most models come in")
    worth_trained = Worth(0.9, 0.1, "plain bf16 lost 0.04 of 1.01 nats in a small run, docs/log.md")

    def refuses(self, setting: MemorySetting) -> str | None:
        return only_in_full(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(dtype="bfloat16")

    def load(self, folder: Path, device: str) -> Any:
        from thrifty.signals.models import load_model

        return load_model(folder, "bfloat16", device)

    def load_sharded(self, folder: Path, device: str, count: int) -> Any:
        from thrifty.signals.models import load_model

        return load_model(folder, "bfloat16", device, shards=count)
