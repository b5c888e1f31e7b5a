"""LoRA that begins as what 4 bits lose of the weights.

s B A begins as the first ``rank`` singular directions of W - Q, Q the weights as they are stored:
one round of the paper's, on NF4 or int8 weights as any other adapter finds them. W is read from the
base model's files again. PEFT's own takes a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import Worth
from thrifty.costs.shape import ModelShape
from thrifty.holding.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class LoftQ(LowRank):
    """LoRA that begins as what 4 bits lose of the weights."""

    searched = False  # it holds a step as LoRA does
    source = "arXiv:2310.08659"
    worth = Worth(0.62, 0.15, "as LoRA; arXiv:2310.08659 gains most at 2 bits")
    learning_rate = 10.0  # arXiv:2310.08659 searches where LoRA does
    start = "loftq"

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.low_rank_start import begin_with_what_is_lost

        found = super().prepare(model, shape, seed)
        begin_with_what_is_lost(found)
        return found
