"""Runs that a law should not be fitted to, found by a stated rule and named.

    fit; r_i = log L_i - log L(x; i) less its median; b = median |r| / ln 2;
    out where |r_i| > b ln(n / 0.0027); fit the rest, until nothing changes

Errors of log loss have tails like Laplace's, for which Huber's loss with a small delta is the
likelihood: of n of them the farthest passes the bound with a chance of 0.27%, that of one normal
error passing three standard deviations. The median leaves out as many of the smallest errors as the
law has numbers, which the fit itself made small. More than a fifth of the runs is no few bad ones:
then none is out, and the law does not hold for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.scaling.points import Points

CHANCE = 0.0027
MOST = 0.2
LEAST_SCALE = 1e-4
"""Of log loss: nobody knows a loss better."""
ROUNDS = 20


def without_outliers(
    estimate: Callable[[Points], Any],
    log_errors: Callable[[Any, Points], NDArray[np.float64]],
    points: Points,
    num_numbers: int,
) -> tuple[Any, NDArray[np.bool_]]:
    """A law, and which of the points it was fitted to."""
    keep = np.ones(len(points), dtype=bool)
    law = whole = estimate(points)
    for _ in range(ROUNDS):
        found = inliers(log_errors(law, points), keep, num_numbers)
        if found.sum() < (1 - MOST) * len(points):
            return whole, np.ones(len(points), dtype=bool)
        if np.array_equal(found, keep):
            break
        keep = found
        law = estimate(points.take(keep))
    return law, keep


def inliers(
    errors: NDArray[np.float64], kept: NDArray[np.bool_], num_numbers: int
) -> NDArray[np.bool_]:
    """By the errors of all, the scale of those that were kept."""
    away = np.abs(errors - np.median(errors[kept]))
    told = np.sort(away[kept])[num_numbers:]
    scale = max(float(np.median(told)) / np.log(2) if len(told) else 0.0, LEAST_SCALE)
    return away <= scale * np.log(len(errors) / CHANCE)
