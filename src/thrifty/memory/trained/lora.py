"""Low-rank adapters on every linear of the layers, the weights frozen.

y = W x + B A x alpha / rank. PEFT keeps A and B in float32 unless told otherwise, and then keeps
a float32 copy of each adapted linear's input.
"""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.core.contracts import Worth
from thrifty.holding.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Low-rank adapters on every linear of the layers, the weights frozen."""

    shards = True
    switches = True
    source = "arXiv:2106.09685"
    worth = Worth(0.6, 0.15, "LoRA learns less per token, arXiv:2405.09673")
