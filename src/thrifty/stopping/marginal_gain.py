"""Marginal gain: go on while what one more interval brings at the end beats its price.

    stop  <=>  (g + z s) / c  <=  price

g: how much lower the loss ends after one more interval and the cool-down than after the cool-down
alone; s: its standard error; c: the interval's cost in the binding resource. Both ends are forecast
under the learning rate that each would have (``scaling/endings.py``).

"computation should be halted or reallocated once marginal performance gains fall below a
budget-dependent threshold" (arXiv:2606.10706). Training on is the incumbent and has the benefit of
the doubt, so that an up-tick within noise stops nothing. With a price of zero (no other use for
what remains) only a loss that surely rises stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar

from thrifty.core.contracts import Evaluation, Outlook, StoppingRule, Verdict
from thrifty.core.marginal import Estimate, Option, choose
from thrifty.core.ranges import check_ranges
from thrifty.scaling.endings import endings, odds_text


@dataclass(frozen=True, kw_only=True)
class MarginalGain(StoppingRule):
    """Stop when the next interval's forecast gain per unit no longer beats the price."""

    min_evaluations: int = 4
    """Finite losses before the forecast may stop a run."""
    z: float = 2.5
    """Standard errors of benefit of the doubt; 2.5: of recorded runs under 5% were stopped in error
    at every price tried, with 1.645 up to 8% (docs/forecasts.md)."""

    source: ClassVar[str] = "arXiv:2606.10706"
    weighs_price: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, min_evaluations=(1, inf), z=(0, inf))

    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict:
        seen = endings(history, outlook)
        known = sum(isfinite(evaluation.loss) for evaluation in history)
        if seen is None or known < self.min_evaluations:
            return Verdict(
                stop=False,
                reason=f"{known} of {self.min_evaluations} evaluations to judge by",
                forecast=seen,
            )
        gain = Estimate(seen.gain, seen.gain_stderr, outlook.unit, "history")
        choice = choose(
            [Option("train on", gain, outlook.next_interval, "an interval, then the cool-down")],
            resource=outlook.resource,
            price=outlook.price,
            incumbent="train on",
            z=self.z,
        )
        reason = f"an interval more gains {seen.gain:.4f} ± {seen.gain_stderr:.4f} at the end; "
        return Verdict(
            stop=choice.chosen is None,
            reason=f"{reason}{choice.reason}; {odds_text(seen)}",
            choice=choice,
            forecast=seen,
        )
