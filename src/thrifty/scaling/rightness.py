"""How often a vote is right, fitted where gold answers are known.

    P(answer a is right) = v_a^s / (sum_b v_b^s + none),      v_a its share of the votes,

a conditional logit with "none of these" as one more choice, by maximum likelihood with a weak pull
towards s = 1 (as often right as it is said), for which a few questions are enough to begin with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from thrifty.core.sampling import Outcome

_PULL = 2.0
"""Of log s towards 0, what half a square counts; of log none a tenth of it, towards a fifth."""


def fit_rightness(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``sharpness``, ``none`` and ``num_questions``; only the last, 0, where nothing can be learnt:
    no outcome has a readable answer."""
    choices = [choice for outcome in outcomes if (choice := _choice(outcome)) is not None]
    if not choices:
        return {"num_questions": 0}

    def loss(theta: NDArray[np.float64]) -> float:
        log_s, log_none = theta
        s, none = math.exp(log_s), math.exp(log_none)
        total = 0.5 * _PULL * (log_s**2 + 0.1 * (log_none - math.log(0.2)) ** 2)
        for shares, right in choices:
            powers = shares**s
            total -= math.log((none if right is None else powers[right]) / (powers.sum() + none))
        return total

    bounds = [(math.log(0.05), math.log(10.0)), (math.log(1e-4), math.log(1e4))]
    start = np.array([0.0, math.log(0.2)])
    found = minimize(loss, start, method="Nelder-Mead", bounds=bounds)
    log_s, log_none = (float(value) for value in found.x)
    return {
        "sharpness": math.exp(log_s),
        "none": math.exp(log_none),
        "num_questions": len(choices),
    }


def _choice(outcome: Outcome) -> tuple[NDArray[np.float64], int | None] | None:
    """The shares of a question's answers, and which of them is right."""
    counts = outcome.counts()
    if not counts:
        return None
    right = {
        answer
        for answer, correct in zip(outcome.answers, outcome.correct, strict=True)
        if answer is not None and correct >= 0.5
    }
    place = next((i for i, answer in enumerate(counts) if answer in right), None)
    shares = np.array(list(counts.values()), dtype=float)
    return shares / shares.sum(), place
