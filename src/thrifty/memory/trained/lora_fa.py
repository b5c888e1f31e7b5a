"""LoRA of which one matrix alone is trained, so that no input is kept.

y = W x + B A x alpha / rank, A as it began. Then x is not kept, only A x, rank wide; and half of
the adapter has a gradient and states.
"""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.core.contracts import Worth
from thrifty.holding.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LowRank):
    """LoRA of which one matrix alone is trained, so that no input is kept."""

    searched = False
    shards = True
    source = "arXiv:2308.03303"
    worth = Worth(0.55, 0.15, "arXiv:2308.03303: LoRA less 0 to 1 points")
    learning_rate = 10.0  # arXiv:2308.03303 searches where LoRA does
    form = "lora_fa"
