"""Budget share: cool down once a set share of a resource of the budget is spent.

The rule of who knows what the rest of the budget is for. It looks at no loss; the forecast beside
it says what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from thrifty.core.budget import CONSUMED
from thrifty.core.contracts import Evaluation, Outlook, StoppingRule, Verdict
from thrifty.core.quantities import show
from thrifty.core.ranges import check_ranges
from thrifty.scaling.endings import endings, odds_text


@dataclass(frozen=True, kw_only=True)
class BudgetShare(StoppingRule):
    """Cool down once so large a share of the budget is spent."""

    share: float = 0.8
    """Of the limit, scoring and evaluations included; the cool-down comes on top."""
    resource: str = ""
    """flops, tokens, seconds, dollars or joules; empty: the one that binds."""

    source: ClassVar[str] = "a fixed share, as in arXiv:2405.18392's cool-downs"

    def __post_init__(self) -> None:
        check_ranges(self, share=(0, 1))
        if self.resource and self.resource not in CONSUMED:
            raise ValueError(
                f"there is no share of {show(self.resource)}\nhint: one of {', '.join(CONSUMED)}"
            )

    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict:
        resource = self.resource or outlook.resource
        seen = endings(history, outlook)
        spent, left = outlook.spent.of(resource), outlook.remaining.of(resource)
        if spent is None or left is None or not 0 < spent + left < inf:
            return Verdict(
                stop=False, reason=f"the budget has no limit of {resource}", forecast=seen
            )
        share = spent / (spent + left)
        reason = f"{100 * share:.0f}% of {resource} spent, {100 * self.share:.0f}% allowed"
        return Verdict(
            stop=share >= self.share, reason=f"{reason}; {odds_text(seen)}", forecast=seen
        )
