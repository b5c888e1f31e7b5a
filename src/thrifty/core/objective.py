"""What a run is to lower, and what it must not spoil on the way: plan.yaml's ``objective`` and
``guard``.

One objective a run. What is lowered is a loss, always: of a metric that scores generated answers,
1 - score. The user reads the score (``shown``), in gains, prices and floors too: a unit of it is
all of it, from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from thrifty.core.contracts import AnswerMetric
from thrifty.core.plan_serving import Serving
from thrifty.core.quantities import Dollars
from thrifty.core.resolve import Spec, resolve


def _metric(value: Any) -> Spec:
    """Looks whether there is such a metric."""
    resolve("metric", value)
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Rows on which the model must not get worse than the base, whatever it gains elsewhere."""

    sources: tuple[str, ...] = ()
    max_worse: float = 0.02
    """By how much at most, in nats a token of their answers (of plain text: of all of it)."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The one currency of gains in this run. What the run lowers is a loss: 1 - score where the
    metric is a score of generated answers."""

    metric: Annotated[Spec, _metric] = "dev_loss"
    max_new_tokens: int = 128
    """Of a generated answer; where the metric looks at none, none is generated."""
    unit: str = ""
    """Follows from the metric (and on pairs from the task)."""
    dollars_per_unit: Dollars | None = None
    """What a unit of gain is worth to the user: the price of what remains. None: zero. A unit of a
    score is all of it, from 0 to 1; a point is a hundredth."""

    law: str = ""
    """Of models whose size is free, a file of ``thrifty law fit`` or a published one: what it says
    that a FLOP brings elsewhere is the price too. Empty: the model is what it is."""
    serving: Serving | None = None
    """Questions that the budget is to answer as well; None: it ends with training."""

    def __post_init__(self) -> None:
        metric = resolve("metric", self.metric)
        if isinstance(metric, AnswerMetric) or not self.unit.startswith("nats/"):
            object.__setattr__(self, "unit", metric.unit)
        if self.law and self.unit != "nats/token":
            raise ValueError(
                f"objective.law is in nats a token, and the objective in {self.unit}\n"
                "hint: objective.metric: dev_loss, or leave objective.law out"
            )
        if not self.max_new_tokens > 0:
            raise ValueError(
                f"objective.max_new_tokens must be more than zero, not {self.max_new_tokens}\n"
                "hint: a number needs a few, its reasoning 256 or more"
            )

    @property
    def answers(self) -> AnswerMetric | None:
        """The metric, where it scores answers that are generated; None where it is a loss."""
        metric = resolve("metric", self.metric)
        return metric if isinstance(metric, AnswerMetric) else None

    @property
    def generated_tokens(self) -> int:
        """At most, of an answer; 0 where none is generated."""
        return self.max_new_tokens if self.answers else 0

    @property
    def name(self) -> str:
        """As the user reads it: ``loss``, or the score's."""
        return self.unit if self.answers else "loss"

    def shown(self, loss: float) -> float:
        """A loss as the user's own number: of a score, the score."""
        return 1.0 - loss if self.answers else loss
