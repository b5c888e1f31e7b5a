"""Which scorer pays under which budget, by the prior alone (arXiv:2410.16208).

A budget of F, as a share of what one pass over the whole pool takes to train, leaves a scorer whose
own price is c the share F - c to train on. What that is worth is ``effective_tokens.py``'s:

    worth(F) = s * w^g(s),   s = min(1, F - c),   g(s) = min(1, ln(1/s) / ln 20)

w: how many random tokens a picked one is worth where 5% of the pool is kept. The price holds the
regime: c = a (N_scorer / N_trained) / m, a = 2 / 6 for a forward pass over the pool, more for
gradients, shared by the m tasks that the same scores serve. So 5x and 10x between model and scorer
are no rule of their own, but where c becomes small enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, stdev

from thrifty.core.contracts import Worth
from thrifty.effective_tokens import worth_of_share

FITTED_AT = (0.05, 0.1, 0.25)
"""Shares of the pool at which worths are read off: below, no scorer is worth more than at 5%;
above, what is kept is so much of the pool that noise is all that a worth could be read off."""
RATIOS = tuple(2 ** (n / 4) for n in range(33))
"""Of model to scorer sizes, those tried."""


@dataclass(frozen=True)
class Arm:
    """A scorer: what a token that it picks is worth, and its price as a share of one pass."""

    worth: float
    price: float = 0.0


def price_of(passes: float, model_over_scorer: float, num_tasks: int = 1) -> float:
    """A scoring's price as a share of one pass of training: ``passes`` such passes of its own
    model, which is so many times smaller, for each of so many tasks."""
    return passes / model_over_scorer / num_tasks


def worth_of(arm: Arm, budget: float) -> float:
    """Shares of the pool, drawn at random, that would do as well; 0 where nothing is left."""
    share = min(1.0, budget - arm.price)
    if share <= 0:
        return 0.0
    return share * worth_of_share(Worth(arm.worth, 0.0, ""), share)


def winner(arms: Mapping[str, Arm], budget: float) -> str:
    """The first-named of those that do best."""
    return max(arms, key=lambda name: worth_of(arms[name], budget))


def break_even(
    arms: Mapping[str, Arm], name: str, passes: float, budgets: Sequence[float]
) -> float | None:
    """The smallest ratio of the model's size to the scorer's at which ``name`` is best under some
    budget; None where it never is."""
    for ratio in RATIOS:
        priced = {**arms, name: Arm(arms[name].worth, price_of(passes, ratio))}
        if any(winner(priced, budget) == name for budget in budgets):
            return ratio
    return None


def worth_from(
    random: Sequence[tuple[float, float]], picked: Sequence[tuple[float, float]]
) -> list[float]:
    """ln w, read off each point of a curve (share trained on, score) beside that of random rows:
    the share of random rows that scores as well, interpolated in its logarithm."""
    found = []
    for share, score in picked:
        exponent = min(1.0, math.log(1 / share) / math.log(20)) if share < 1 else 0.0
        if any(math.isclose(share, known, rel_tol=1e-6) for known in FITTED_AT):
            found.append(math.log(_share_for(random, score) / share) / exponent)
    return found


def worth_of_many(points: Sequence[float]) -> Worth:
    """The median of ``worth_from``'s points: a collapsed run among them decides nothing."""
    middle = math.exp(median(points))
    spread = stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.inf
    return Worth(middle, middle * spread, "fitted to curves of score against share")


def _share_for(random: Sequence[tuple[float, float]], score: float) -> float:
    """Of random rows, to reach ``score``; more rows do no worse."""
    known = sorted(random)
    best = -math.inf
    rising = [(share, best := max(best, found)) for share, found in known]
    if score <= rising[0][1]:
        return rising[0][0]
    for (low, below), (high, above) in pairwise(rising):
        if score <= above:
            part = (score - below) / (above - below)
            return low * (high / low) ** part
    return rising[-1][0]
