"""The logits of a few tokens at a time, made again for their backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import LossMemory, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting


@dataclass(frozen=True, kw_only=True)
class Chunked(LossMemory):
    """The logits of a few tokens at a time, made again for their backward."""

    makes = "fit"
    runs = True
    shards = True
    source = "arXiv:2411.09009"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    tokens: int = 1024

    def __post_init__(self) -> None:
        check_ranges(self, tokens=(1, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        return "without a backward no logits are kept" if setting.zeroth_order else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(loss_chunk=self.tokens)

    def hold(self, model: Any) -> None:
        from thrifty.holding.chunked_loss import hold_few_logits

        hold_few_logits(model, self.tokens)
