"""LoRA that begins as the main singular directions of the weights.

W = U S V': B A begins as its first ``rank`` singular directions, and the frozen weights are what is
left, so that the model is the same. What is saved is LoRA of twice the rank on the weights as they
were, for stock libraries: W + s B A - s B0 A0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from thrifty.core.contracts import Worth
from thrifty.holding.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class PiSSA(LowRank):
    """LoRA that begins as the main singular directions of the weights."""

    searched = False  # it holds a step as LoRA does
    source = "arXiv:2404.02948"
    worth = Worth(0.65, 0.15, "arXiv:2404.02948: 4 to 5 points above LoRA on GSM8K")
    learning_rate = 1.0  # arXiv:2404.02948: the rate of full fine-tuning, 2e-5
    start = "pissa"
    of_peft: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "pissa"}

    alpha: float = 16.0

    def save(self, model: Any, folder: Path) -> bool:
        from thrifty.holding.low_rank_start import save_on_the_base

        save_on_the_base(model, folder)
        return True
