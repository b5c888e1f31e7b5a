"""Two moments a weight, in its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import ADAMW, MemorySetting, needs_a_gradient
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerStates):
    """Two moments a weight, in its dtype."""

    makes = "faster"
    runs = True
    shards = True
    source = "arXiv:1711.05101"
    worth = Worth(1.0, 0.0, "reference")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=ADAMW)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        import torch

        from thrifty.holding.tensor_by_tensor import BETAS, EPS

        return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
