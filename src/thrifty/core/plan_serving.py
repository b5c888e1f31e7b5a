"""``objective.serving`` in plan.yaml: questions that the run's budget is to answer as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from thrifty.core.resolve import name_of, resolve

if TYPE_CHECKING:
    from thrifty.core.plan import Plan

MOST_SAMPLES = 256
"""Of a question: the tables of ``scaling/vote_gain.py`` reach so far."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """To be answered by a vote over samples once training is over (``thrifty decode RUN``), which
    therefore stops where samples are the better buy."""

    questions: int
    """Like the dev rows'."""
    max_samples: int = 40
    """Of a question, whatever is left."""
    dev_samples: int = 8
    """That an evaluation draws for each dev row, to know what more of them are worth."""
    temperature: float = 0.7
    """Of the samples."""
    tokens: float | None = None
    """Of an answer, on average; None: as many as the dev rows' turn out to have."""


def wrong_serving(plan: Plan) -> Iterator[str]:
    """What stands against it."""
    serving = plan.objective.serving
    if serving is None:
        return
    ranges = {
        "questions": (1, inf),
        "max_samples": (1, MOST_SAMPLES),
        "dev_samples": (2, MOST_SAMPLES),
        "temperature": (1e-3, 1e3),
        "tokens": (1, inf),
    }
    for name, (least, most) in ranges.items():
        value = getattr(serving, name)
        if value is not None and not least <= value <= most:
            wanted = f"at least {least:g}" if most == inf else f"from {least:g} to {most:g}"
            yield f"objective.serving.{name} must be {wanted}, not {value}"
    answers = plan.objective.answers
    if answers is None or not answers.compares:
        yield (
            f"objective.serving takes votes, and of objective.metric {plan.objective.unit} nobody "
            "knows which answers are equal: use number or exact_match"
        )
    if plan.budget.flops is None:
        yield (
            "objective.serving shares the budget's FLOPs between training and answering, and the "
            "budget does not limit them: set budget.flops"
        )
    if not resolve("stopping", plan.stopping).weighs_price:
        name = name_of(resolve("stopping", plan.stopping))
        yield f"objective.serving is a price, which stopping {name} does not weigh: marginal_gain"
    if plan.training.devices > 1:
        yield "objective.serving uses one device"
