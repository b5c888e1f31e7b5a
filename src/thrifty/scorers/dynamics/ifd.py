"""Instruction-following difficulty: how little the prompt helps with the answer (arXiv:2308.12032).

    score = IFD = exp( L(y | x) - L(y) )      where it is below 1, else -IFD

High = hard to follow, hence instructive; 1 and more = the answer does not fit its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Worth
from thrifty.signals.conditional import DifficultyScorer


@dataclass(frozen=True, kw_only=True)
class IFD(DifficultyScorer):
    """How little the prompt helps with the answer, of pairs where it helps at all."""

    source: ClassVar[str] = "arXiv:2308.12032"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "a tenth of Alpaca is level with it all, arXiv:2308.12032; loses in 2503.01807"
    )
