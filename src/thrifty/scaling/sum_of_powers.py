"""Fit E + sum_k c_k / x_k^p_k: Chinchilla's form with x = (N, D), of tokens alone with x = (D).

The free numbers are (log E, log c_1 .. log c_K, log p_1 .. log p_K); log L is a log-sum-exp of
(log E, log c_k - p_k log x_k), so that all of them stay positive (arXiv:2203.15556). Inside, log x
is taken from its mean: c and p then hardly depend on each other, which spares most of the descent.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from thrifty.scaling.descent import Vector
from thrifty.scaling.huber import coefficients, fit, fit_each, log_sum

EXPONENTS = np.arange(0.1, 1.25, 0.05)
"""Tried for each term as starts."""


def predict(x: Vector, logs: Vector) -> tuple[Vector, Vector]:
    """log L, [starts, n], and its derivatives, [starts, n, 2 K + 1]; ``logs`` [K, n]."""
    count = len(logs)
    log_E, log_c, powers = x[:, :1], x[:, 1 : count + 1], np.exp(x[:, count + 1 :])
    terms = [log_E + 0.0 * logs[0]]
    terms += [log_c[:, k, None] - powers[:, k, None] * logs[k] for k in range(count)]
    log_loss, shares = log_sum(np.array(terms))
    slopes = [-shares[k + 1] * powers[:, k, None] * logs[k] for k in range(count)]
    return log_loss, np.stack([*shares, *slopes], axis=2)


def starts(logs: Vector, log_loss: Vector, weights: Vector) -> Vector:
    """For each choice of exponents the other numbers by least squares, where all are positive."""
    found = []
    for powers in product(EXPONENTS, repeat=len(logs)):
        columns = np.exp(-np.array(powers)[:, None] * logs)
        numbers = coefficients(np.vstack([np.ones_like(log_loss), columns]).T, log_loss, weights)
        if numbers is not None:
            found.append([*np.log(numbers), *np.log(powers)])
    if not found:  # losses that do not fall: half of the least, and all terms alike
        rest = np.log(np.exp(log_loss).mean() / 2 / len(logs))
        found.append([log_loss.min() - np.log(2), *[rest] * len(logs), *[np.log(0.3)] * len(logs)])
    return np.array(found)


def fit_powers(logs: Vector, log_loss: Vector, weights: Vector, near: Vector | None) -> Vector:
    """(E, c, p): [2 K + 1] for ``weights`` [n], or [2 K + 1, draws] for [draws, n] from ``near``,
    the numbers of the fit to all."""
    count = len(logs)
    middle = logs.mean(axis=1)
    centred = logs - middle[:, None]
    if near is None:
        first = starts(centred, log_loss, weights)
        x = fit(lambda x: predict(x, centred), first, log_loss, weights)[None]
    else:
        start = np.log(near)
        start[1 : count + 1] -= near[count + 1 :] * middle
        first = np.broadcast_to(start, (len(weights), len(start)))
        x = fit_each(lambda x: predict(x, centred), first, log_loss, weights)
    powers = np.exp(x[:, count + 1 :])
    numbers = np.exp(x)
    numbers[:, 1 : count + 1] = np.exp(x[:, 1 : count + 1] + powers * middle)
    found: Vector = numbers[0] if near is None else numbers.T
    return found
