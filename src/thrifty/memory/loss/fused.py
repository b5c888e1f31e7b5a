"""The logits of a few tokens at a time, and their gradient with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from thrifty.core.contracts import LossMemory, Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.setting import MemorySetting

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Fused(LossMemory):
    """The logits of a few tokens at a time, and their gradient with them."""

    makes = "fit"
    searched = False
    runs = True
    source = "arXiv:2410.10989"
    worth = Worth(1.0, 0.0, "the same arithmetic")

    tokens: int = 1024

    def __post_init__(self) -> None:
        check_ranges(self, tokens=(1, inf))

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.zeroth_order:
            return "without a backward no logits are kept"
        if setting.num_devices > 1 and setting.adapter is None:
            return "it takes the head whole, which lies cut over the devices"
        return None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        return "its logits are capped" if shape.logit_softcap else None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(loss_chunk=self.tokens, loss_fused=True)

    def hold(self, model: Any) -> None:
        from thrifty.holding.fused_loss import hold_no_logits

        hold_no_logits(model, self.tokens)
