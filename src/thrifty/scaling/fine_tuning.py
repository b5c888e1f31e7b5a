"""The rectified law of fine-tuning: loss against fine-tuning tokens of one pretrained model.

    L(D) = E + B / (D_l + D^beta)                                           (arXiv:2402.02314)

D = tokens (or examples) of fine-tuning, 0 allowed; D_l = what the model has learnt of the task
before, which bends the curve at its start: first hardly a gain, then a power of D. The free numbers
are (log E, log B, log D_l, log beta).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from thrifty.scaling.descent import Vector
from thrifty.scaling.huber import coefficients, fit, fit_each, log_sum
from thrifty.scaling.laws import Number
from thrifty.scaling.points import Points

EXPONENTS = np.arange(0.1, 1.45, 0.1)
BENDS = (0.0, 0.25, 0.5, 0.75)
"""Quantiles of D at which the curve may bend."""


@dataclass(frozen=True, kw_only=True)
class Rectified:
    """Loss of fine-tuning tokens."""

    E: Number
    B: Number
    D_l: Number
    beta: Number

    def loss(self, D: Number) -> Number:
        return self.E + self.B / (self.D_l + np.power(D, self.beta))


def predict(x: Vector, D: Vector) -> tuple[Vector, Vector]:
    """log L, [starts, n], and its derivatives, [starts, n, 4]."""
    log_E, log_B, log_D_l = (x[:, i, None] + 0.0 * D for i in range(3))
    beta = np.exp(x[:, 3:])
    known = D > 0
    log_D = np.log(np.where(known, D, 1.0))
    learnt = np.where(known, beta * log_D, -np.inf)
    below, parts = log_sum(np.stack([log_D_l, learnt]))
    log_loss, shares = log_sum(np.stack([log_E, log_B - below]))
    of_term = shares[1]
    slopes = [shares[0], of_term, -of_term * parts[0], -of_term * parts[1] * beta * log_D]
    return log_loss, np.stack(slopes, axis=2)


def starts(D: Vector, log_loss: Vector, weights: Vector) -> Vector:
    """For each exponent and each point where the curve may bend, the rest by least squares.

    Raises ValueError where none has positive numbers.
    """
    found = []
    for beta in EXPONENTS:
        for bend in np.quantile(D[D > 0], BENDS):
            feature = bend**beta / (bend**beta + D**beta)
            features = np.stack([np.ones_like(D), feature], axis=1)
            numbers = coefficients(features, log_loss, weights)
            if numbers is not None:
                log_E, log_B = np.log(numbers)
                log_D_l = beta * np.log(bend)
                found.append([log_E, log_B + log_D_l, log_D_l, np.log(beta)])
    if not found:
        raise ValueError(
            "the loss does not fall with the tokens, so that no law of fine-tuning fits it\n"
            "hint: give the evaluations of one run, or of runs that differ in their tokens alone"
        )
    return np.array(found)


def fit_rectified(points: Points, weights: Vector, near: Rectified | None) -> Rectified:
    """For ``weights`` [n], or a law for each of [draws, n] from ``near``."""
    D, log_loss = points.D, points.log_loss
    if near is None:
        first = starts(D, log_loss, weights)
        x = fit(lambda x: predict(x, D), first, log_loss, weights)
    else:
        start = np.broadcast_to(np.log(astuple(near)), (len(weights), 4))
        x = fit_each(lambda x: predict(x, D), start, log_loss, weights).T
    E, B, D_l, beta = np.exp(x)
    return Rectified(E=E, B=B, D_l=D_l, beta=beta)
