"""The MLP of a few tokens at a time, made again for their backward.

Attention keeps what it needs, the MLP its input alone. For long rows, of whose activations the MLP
has the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import ActivationMemory, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ChunkedMLP(ActivationMemory):
    """The MLP of a few tokens at a time, made again for their backward."""

    makes = "fit"
    runs = True
    searched = False
    source = "arXiv:2306.09539; ALST, arXiv:2506.13996"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    tokens: int = 1024
    """Of each row at a time."""

    def __post_init__(self) -> None:
        check_ranges(self, tokens=(1, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.zeroth_order:
            return "without a backward nothing is kept"
        if setting.adapter is not None and setting.adapter.form == "dora":
            return "it would make the norms of whole matrices anew for each slice"
        return None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        if shape.experts is not None:
            return f"{shape.model_type} has experts, each of which would run again for every slice"
        if shape.model_type == "opt":
            return "the MLP of opt is no module of its own, which could be given slices"
        return None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(mlp_chunk=self.tokens)

    def hold(self, model: Any) -> None:
        from thrifty.holding.chunked_mlp import run_in_slices

        run_in_slices(model, self.tokens)
