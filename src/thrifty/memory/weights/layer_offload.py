"""Frozen layers in bfloat16 that wait on the host, one at a time on the device.

A step brings each but one over the link for its forward, and again for its backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.contracts import WeightStorage, Worth
from thrifty.costs.setting import MemorySetting, only_in_full


@dataclass(frozen=True, kw_only=True)
class LayerOffload(WeightStorage):
    """Frozen layers in bfloat16 that wait on the host, one at a time on the device."""

    makes = "fit"
    runs = True
    searched = False  # what its evaluations fetch is not priced
    source = "arXiv:2104.07857"
    worth = Worth(1.0, 0.0, "the same arithmetic as bfloat16")

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.device_kind == "cpu":
            return "there is no other place to put them"
        adapter = setting.adapter
        if adapter is None:
            return "layers that come and go cannot be trained themselves, only adapters on them"
        if adapter.start == "pissa" or adapter.form == "dora":
            return "it looks at the weights to begin with, which are not there"
        if setting.num_devices > 1:
            return "weights that are shared among devices are gathered there, not on the host"
        if setting.replicas > 1:
            return "devices that train together begin by sending each other the weights"
        return only_in_full(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(dtype="bfloat16", layers_on_host=True)

    def load(self, folder: Path, device: str) -> Any:
        from thrifty.holding.host_layers import load_on_host

        return load_on_host(folder, device)
