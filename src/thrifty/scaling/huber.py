"""The numbers of a law from points: Huber's loss on log loss, from many starts at once.

    min over x of  sum_i w_i Huber_delta(log L(x; i) - log L_i),   delta = 1e-3   (arXiv:2203.15556)

``predict(x)`` takes ``x`` [starts, p] and returns log L, [starts, n], and its derivatives,
[starts, n, p]. With so small a delta this is nearly the sum of absolute errors, which one bad point
hardly moves. All starts, or all draws of a bootstrap with the points' weights in each, go down
together (``minimise``): one evaluation is one pass of array operations over all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from thrifty.scaling.descent import Vector, minimise

Predict = Callable[[Vector], tuple[Vector, Vector]]

DELTA = 1e-3
REFINED = 12
"""Starts that are refined: the best by their objective."""


def huber(residuals: Vector) -> Vector:
    """Huber's loss, elementwise."""
    size = np.abs(residuals)
    found: Vector = np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
    return found


def objective(
    predict: Predict, log_loss: Vector, weights: Vector
) -> Callable[[Vector], tuple[Vector, Vector]]:
    """x [starts, p] -> values [starts] and gradients [starts, p]; ``weights`` [starts or 1, n]."""

    def evaluate(x: Vector) -> tuple[Vector, Vector]:
        predicted, jacobian = predict(x)
        residuals = predicted - log_loss
        pull = weights * np.clip(residuals, -DELTA, DELTA)
        return (weights * huber(residuals)).sum(axis=1), np.einsum("snp,sn->sp", jacobian, pull)

    return evaluate


def fit(predict: Predict, starts: Vector, log_loss: Vector, weights: Vector) -> Vector:
    """The least minimum, [p], found from the best of ``starts``; ``weights`` [n]."""
    evaluate = objective(predict, log_loss, weights[None])
    values, _ = evaluate(starts)
    best = starts[np.argsort(values, kind="stable")[:REFINED]]
    found, values = minimise(evaluate, best)
    least: Vector = found[np.argmin(values)]
    return least


def fit_each(predict: Predict, starts: Vector, log_loss: Vector, weights: Vector) -> Vector:
    """A minimum for each row of ``weights`` [draws, n] from its own start: [draws, p]."""
    return minimise(objective(predict, log_loss, weights), starts)[0]


def coefficients(features: NDArray[np.float64], log_loss: Vector, weights: Vector) -> Vector | None:
    """The positive ``c`` with ``features @ c`` nearest to the loss, errors relative to it; None
    where one would not be positive. ``features`` [n, k]. With given exponents a law is linear in
    the rest: a start costs no descent."""
    scale = np.sqrt(weights)
    size = np.linalg.norm(features, axis=0)
    found, _ = nnls(features / size * (scale * np.exp(-log_loss))[:, None], scale)
    return found / size if np.all(found > 0) else None


def log_sum(terms: Vector) -> tuple[Vector, Vector]:
    """log of the sum of exp(terms) over the first axis, and each term's share of it."""
    most = terms.max(axis=0)
    shares = np.exp(terms - most)
    total = shares.sum(axis=0)
    return most + np.log(total), shares / total
