"""Fit R_D and R_N, what repeated tokens and excess parameters are worth, on a law that is known.

    log L(R; i) with L of ``laws.py``, N_opt from the law's own A, B, alpha, beta

In two stages as arXiv:2305.16264 has it: the law from runs that repeat nothing, then R from all.
The free numbers are (log R_D, log R_N).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from thrifty.scaling.descent import Vector
from thrifty.scaling.huber import fit, fit_each
from thrifty.scaling.laws import MOST_REPEATS, Law, effective, limit_of
from thrifty.scaling.points import Points

STARTS = np.log(list(product([0.3, 1.0, 4.0, 15.0, 60.0], repeat=2)))


def predict(x: Vector, law: Law, points: Points) -> tuple[Vector, Vector]:
    """log L, [starts, n], and its derivatives, [starts, n, 2]; the law's numbers are floats or
    [starts, 1]."""
    fresh = np.minimum(points.unique, points.D)
    suited = np.minimum(points.N, law.parameters_for(fresh))
    R_D, R_N = np.exp(x[:, :1]), np.exp(x[:, 1:])
    tokens, parameters = effective(points.D, fresh, R_D), effective(points.N, suited, R_N)
    of_parameters, of_tokens = law.A / parameters**law.alpha, law.B / tokens**law.beta
    loss = law.E + of_parameters + of_tokens
    by_D = -law.beta * of_tokens / tokens * _slope(points.D, fresh, R_D)
    by_N = -law.alpha * of_parameters / parameters * _slope(points.N, suited, R_N)
    return np.log(loss), np.stack([by_D / loss, by_N / loss], axis=2)


def _slope(amount: Vector, fresh: Vector, worthwhile: Vector) -> Vector:
    """d effective / d log worthwhile."""
    share = (amount / fresh - 1.0) / worthwhile
    found: Vector = fresh * worthwhile * (-np.expm1(-share) - share * np.exp(-share))
    return found


def fit_repeats(law: Law, points: Points, weights: Vector, near: Law | None) -> Law:
    """``law`` with R_D and R_N; of [draws, n] ``weights`` a law for each, from ``near``."""
    if near is None:
        x = fit(lambda x: predict(x, law, points), STARTS, points.log_loss, weights)
    else:
        numbers: dict[str, Any] = {
            name: np.asarray(getattr(law, name))[:, None]
            for name in ("E", "A", "B", "alpha", "beta")
        }
        each = Law(**numbers)
        start = np.log(np.minimum([near.R_D, near.R_N], MOST_REPEATS))
        first = np.broadcast_to(start, (len(weights), 2))
        x = fit_each(lambda x: predict(x, each, points), first, points.log_loss, weights).T
    R_D, R_N = limit_of(x)
    return replace(law, R_D=R_D, R_N=R_N)
