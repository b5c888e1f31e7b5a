"""Marginal gain: go on while the forecast gain per unit of the scarce resource beats its price.

    stop  <=>  (g + z s) / c  <=  price,      g, s = forecast gain of the next interval and error

"computation should be halted or reallocated once marginal performance gains fall below a
budget-dependent threshold" (arXiv:2606.10706). Training on is the incumbent and has the benefit of
the doubt, so that an up-tick within noise stops nothing. With a price of zero (no other use for
what remains) only a loss that surely rises stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from thrifty.core.contracts import Evaluation, Outlook, StoppingRule, Verdict
from thrifty.core.marginal import Estimate, Option, choose
from thrifty.core.ranges import check_ranges
from thrifty.scaling.curves import forecast


@dataclass(frozen=True, kw_only=True)
class MarginalGain(StoppingRule):
    """Stop when the next interval's forecast gain per unit no longer beats the price."""

    min_evaluations: int = 4
    """Points before the forecast may stop a run."""
    z: float = 1.645
    """Standard errors of benefit of the doubt; 1.645: at most 5% of the stops are noise."""

    source: ClassVar[str] = "arXiv:2606.10706"

    def __post_init__(self) -> None:
        check_ranges(self, min_evaluations=(1, inf), z=(0, inf))

    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict:
        seen = forecast(history, history[-1].flops + outlook.next_interval.flops)
        if seen is None or len(history) < self.min_evaluations:
            return Verdict(
                stop=False,
                reason=f"{len(history)} of {self.min_evaluations} evaluations to judge by",
                forecast=seen,
            )
        gain = Estimate(seen.gain, seen.gain_stderr, outlook.unit, "history")
        choice = choose(
            [Option("train on", gain, outlook.next_interval, "the next evaluation interval")],
            resource=outlook.resource,
            price=outlook.price,
            incumbent="train on",
            z=self.z,
        )
        reason = f"next interval gains {seen.gain:.4f} ± {seen.gain_stderr:.4f}; {choice.reason}"
        return Verdict(stop=choice.chosen is None, reason=reason, choice=choice, forecast=seen)
