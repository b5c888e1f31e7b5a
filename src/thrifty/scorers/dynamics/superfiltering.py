"""Superfiltering: instruction-following difficulty as a small model sees it (arXiv:2402.00530).

    score = IFD under ``model`` (GPT-2 in the paper)

Small and large models agree on the order of difficulties, though not on their size, so that a
twentieth of the cost buys the same choice. Name the small one: ``{superfiltering: {model: gpt2}}``;
without a name it is ``ifd`` under the model to be trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Worth
from thrifty.signals.conditional import DifficultyScorer


@dataclass(frozen=True, kw_only=True)
class Superfiltering(DifficultyScorer):
    """Instruction-following difficulty as a smaller model sees it, at its price."""

    source: ClassVar[str] = "arXiv:2402.00530"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "5% of Alpaca is ahead of it all, arXiv:2402.00530; IFD loses in 2503.01807"
    )
