"""Plateau: stop after ``patience`` evaluations without an improvement beyond noise.

Patience as everybody has it, but an improvement counts only past ``z`` standard errors and an
up-tick within them is no evidence: of 880 MLPerf fine-tuning runs that reached their target, 19%
had an evaluation go up before. An evaluation without a loss is no evidence either; where standard
errors are unknown, as with a dev set of one row, any improvement counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar

from thrifty.core.contracts import Evaluation, Outlook, StoppingRule, Verdict
from thrifty.core.ranges import check_ranges
from thrifty.scaling.endings import endings, odds_text


@dataclass(frozen=True, kw_only=True)
class Plateau(StoppingRule):
    """Stop after so many evaluations in a row without an improvement beyond noise."""

    patience: int = 3
    min_delta: float = 0.0
    """By which the best must improve, in the objective's unit."""
    z: float = 1.0

    source: ClassVar[str] = "Prechelt 1998, with error bars"

    def __post_init__(self) -> None:
        check_ranges(self, patience=(1, inf), min_delta=(0, inf), z=(0, inf))

    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict:
        best, since = inf, 0
        for evaluation in history:
            if not isfinite(evaluation.loss):
                continue
            noise = self.z * evaluation.stderr if evaluation.stderr < inf else 0.0
            if evaluation.loss < best - self.min_delta - (noise if best < inf else 0.0):
                best, since = evaluation.loss, 0
            else:
                since += 1
        seen = endings(history, outlook)
        shown = 1.0 - best if outlook.scored else best
        reason = f"{since} of {self.patience} evaluations without an improvement on {shown:.4f}"
        return Verdict(
            stop=since >= self.patience, reason=f"{reason}; {odds_text(seen)}", forecast=seen
        )
