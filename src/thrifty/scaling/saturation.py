"""How the accuracy of checkpoints goes on: towards an asymptote, exponentially in FLOPs.

    A(B) = a (1 - exp(-b B)) + c,     a >= 0, b > 0            (arXiv:2601.01332)

B: FLOPs of training by then. The paper fits one curve by least squares to the checkpoints that did
not fall behind earlier ones. Here all of them count, each by its error: on a grid of b the rest is
a line, whose a and c, with a pull of one (all of an accuracy) towards none, have a Gaussian in
closed form, cut at a = 0; the curves are weighed by how likely they make what was measured. No
optimiser that may fail, no random number, and three checkpoints are enough for an error bar.

Beside the power law of the forecasts (``scaling/curves.py``): that one knows the learning rate and
goes on falling for ever; this one knows accuracies alone and is all but done after some 3 / b, so
that it promises less of a long training. What is decided on the way goes by the forecasts; this is
for accuracies that somebody recorded, and for the whole trade-off at a glance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Floats = NDArray[np.float64]

LEAST_CHECKPOINTS = 3
RATES = 2.0 ** np.arange(-5.0, 5.01, 0.0625)
"""b of the grid, times the FLOPs of the furthest checkpoint: from a line to one that is there at a
thirtieth of the way."""
UNTOLD_ERROR = 0.01
"""Of an accuracy whose error nobody knows, at least: a point (a guess)."""


@dataclass(frozen=True, eq=False)
class Saturation:
    """Curves, and how likely each is."""

    unit: float
    """FLOPs that b is counted in: those of the furthest checkpoint."""
    weights: Floats  # [curves]
    mean: Floats  # [curves, 2]: of (a, c), where a may be less than 0
    covariance: Floats  # [curves, 2, 2]

    def at(self, flops: float) -> tuple[float, float]:
        """The accuracy there, from 0 to 1, and its standard error."""
        shape = np.stack([-np.expm1(-RATES * flops / self.unit), np.ones(len(RATES))], axis=1)
        plain = (shape * self.mean).sum(axis=1)
        variance = np.einsum("ki,kij,kj->k", shape, self.covariance, shape)
        with_a = np.einsum("ki,ki->k", shape, self.covariance[:, :, 0])
        up, less = _cut(self.mean[:, 0], self.covariance[:, 0, 0])
        mean = plain + with_a / self.covariance[:, 0, 0] * up
        variance = variance - (with_a / self.covariance[:, 0, 0]) ** 2 * less
        found = float(self.weights @ mean)
        spread = float(self.weights @ (np.maximum(variance, 0.0) + (mean - found) ** 2))
        return min(max(found, 0.0), 1.0), math.sqrt(spread)


def fit_saturation(
    flops: Sequence[float], accuracies: Sequence[float], stderrs: Sequence[float] | None = None
) -> Saturation:
    """Of checkpoints. Errors that are not known, 0 or not finite are taken from the scatter, and
    all are widened where the points scatter more about the nearest curve than they say.

    Raises ValueError with fewer than three that differ in their FLOPs.
    """
    given = [math.nan] * len(flops) if stderrs is None else stderrs
    points = np.array(
        [each for each in zip(flops, accuracies, given, strict=True) if math.isfinite(each[1])]
    ).reshape(-1, 3)
    x, y, error = points.T
    if len(np.unique(x)) < LEAST_CHECKPOINTS or not (x >= 0).all():
        raise ValueError(
            f"a curve of accuracies takes {LEAST_CHECKPOINTS} checkpoints that differ in their "
            f"FLOPs, not {len(np.unique(x))}\nhint: evaluate more often"
        )
    unit = float(x.max())
    shape = np.stack([-np.expm1(-np.outer(RATES, x / unit)), np.ones((len(RATES), len(x)))], axis=2)
    known = np.isfinite(error) & (error > 0)
    error = np.where(known, error, max(_scatter(shape, y, np.ones(len(y))), UNTOLD_ERROR))
    error = error * max(_scatter(shape, y, error), 1.0)
    precision = np.eye(2) + np.einsum("kni,n,knj->kij", shape, error**-2, shape)
    covariance = np.linalg.inv(precision)
    mean = np.einsum("kij,knj,n->ki", covariance, shape, y / error**2)
    residuals = y - np.einsum("kni,ki->kn", shape, mean)
    logs = -0.5 * ((residuals / error) ** 2).sum(axis=1) - 0.5 * (mean**2).sum(axis=1)
    logs += 0.5 * np.linalg.slogdet(covariance)[1]
    logs += log_ndtr(mean[:, 0] / np.sqrt(covariance[:, 0, 0]))  # that a is at least 0
    weights = np.exp(logs - logs.max())
    return Saturation(unit, weights / weights.sum(), mean, covariance)


def _scatter(shape: Floats, y: Floats, error: Floats) -> float:
    """About the curve that is nearest to the points, in their errors; three of them tell of none
    where a curve goes through all."""
    within = np.linalg.qr(shape / error[:, None])[0]  # [curves, points, 2], orthonormal
    z = y / error
    rest = z - np.einsum("kni,kmi,m->kn", within, within, z)
    return math.sqrt(float((rest**2).sum(axis=1).min()) / max(len(y) - 3, 1))


def _cut(mean: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """By how much the mean of a Gaussian rises and its variance falls where it is at least 0."""
    sd = np.sqrt(variance)
    z = mean / sd
    hazard = np.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - log_ndtr(z))
    return sd * hazard, variance * hazard * (hazard + z)
