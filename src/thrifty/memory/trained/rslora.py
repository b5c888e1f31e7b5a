"""LoRA whose scale falls with the root of its rank.

y = W x + B A x alpha / sqrt(rank): what an adapter adds keeps its size as the rank grows. At rank
16 an alpha of 8 is LoRA's of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thrifty.core.contracts import Worth
from thrifty.holding.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class RsLoRA(LowRank):
    """LoRA whose scale falls with the root of its rank."""

    searched = False  # it holds a step as LoRA does
    shards = True
    switches = True
    source = "arXiv:2312.03732"
    worth = Worth(0.6, 0.15, "as LoRA at rank 16; arXiv:2312.03732 gains at ranks above 64")
    learning_rate = 10.0  # as LoRA: at rank 16 it is LoRA
    of_peft: ClassVar[Mapping[str, Any]] = {"use_rslora": True}

    alpha: float = 8.0
