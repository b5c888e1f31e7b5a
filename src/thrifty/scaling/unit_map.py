"""From nats to a score of answers: a map calibrated on a run's own evaluations, with its error.

    s(L) = 1 / (1 + exp(b L - a)),   b > 0:   the score that goes with a loss of L nats a token

Accuracy on a task follows its loss along a sigmoid, near zero while the model cannot answer yet and
flat again near one (arXiv:2403.08540, arXiv:2406.04391 see it over models; here it is fitted to one
run's evaluations, each of which measures both). Least squares weighted by the scores' standard
errors, the errors of a and b widened where the points scatter more than those say.

It is refused, rather than guessed, with fewer than four losses that differ, where the score did not
move beyond its noise, or where it fell as the loss did. Far outside the losses seen it is an
extrapolation, whose error says so only as far as the sigmoid holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thrifty.core.marginal import Estimate

LEAST_POINTS = 4
_HINT = "hint: compare options in one unit, or go on until more evaluations have measured both"


@dataclass(frozen=True)
class UnitMap:
    """Loss in ``nats`` -> score in ``unit``."""

    nats: str
    unit: str
    a: float
    b: float
    covariance: NDArray[np.float64]  # [2, 2], of a and b
    low: float
    high: float
    """The losses that it was fitted on."""
    num_points: int

    def score(self, loss: float) -> tuple[float, float]:
        """At ``loss``, and its standard error."""
        found = _sigmoid(self.a - self.b * loss)
        slope = found * (1.0 - found) * np.array([1.0, -loss])
        return found, float(np.sqrt(slope @ self.covariance @ slope))

    def gain(self, gain: Estimate, loss: float) -> Estimate:
        """A gain in nats from ``loss`` on as one of the score: s(L - gain) - s(L).

        Raises ValueError where ``gain`` is in another unit than the map's.
        """
        if gain.unit != self.nats:
            raise ValueError(f"a gain in {gain.unit} is no gain in {self.nats}\n{_HINT}")
        before, after = (_sigmoid(self.a - self.b * at) for at in (loss, loss - gain.mean))
        steep, steeper = before * (1.0 - before), after * (1.0 - after)
        by_map = np.array([steeper - steep, -steeper * (loss - gain.mean) + steep * loss])
        by_gain = self.b * steeper * gain.stderr if gain.stderr else 0.0
        error = math.hypot(float(np.sqrt(by_map @ self.covariance @ by_map)), by_gain)
        return Estimate(after - before, error, self.unit, gain.source)


def calibrate(
    losses: Sequence[float],
    scores: Sequence[float],
    stderrs: Sequence[float],
    *,
    nats: str = "nats/token",
    unit: str,
) -> UnitMap:
    """The map of a run whose evaluations measured ``losses`` and ``scores``; ``stderrs``: of the
    scores' changes, since the rows are the same ones. Raises ValueError where they tell of none."""
    from scipy.optimize import curve_fit

    points = [
        each for each in zip(losses, scores, stderrs, strict=True) if np.isfinite(each[:2]).all()
    ]
    x, y = (np.array([point[i] for point in points]) for i in (0, 1))
    if len(np.unique(x)) < LEAST_POINTS:
        raise ValueError(
            f"nats cannot be mapped to {unit} by {len(np.unique(x))} evaluations that differ in "
            f"their loss: it takes {LEAST_POINTS}\n{_HINT}"
        )
    known = [point[2] for point in points if 0 < point[2] < np.inf]
    floor = max(known, default=0.01)
    error = np.array([point[2] if 0 < point[2] < np.inf else floor for point in points])
    if float(np.ptp(y)) <= 2.0 * float(np.median(error)):
        raise ValueError(
            f"nats cannot be mapped to {unit}: it moved by {np.ptp(y):.4f} in all, which is within "
            f"its noise of {np.median(error):.4f}\n{_HINT}"
        )
    start = _start(x, y)
    try:
        (a, b), covariance = curve_fit(
            _of_losses, x, y, p0=start, sigma=error, absolute_sigma=True, maxfev=10_000
        )
    except RuntimeError:
        raise ValueError(f"no sigmoid fits {unit} against nats in this run\n{_HINT}") from None
    if not (b > 0 and np.isfinite(covariance).all()):
        raise ValueError(
            f"nats cannot be mapped to {unit}: it did not rise as the loss fell\n{_HINT}"
        )
    residuals = (y - _of_losses(x, a, b)) / error
    scatter = float((residuals**2).sum() / (len(x) - 2))
    return UnitMap(
        nats=nats,
        unit=unit,
        a=float(a),
        b=float(b),
        covariance=covariance * max(1.0, scatter),
        low=float(x.min()),
        high=float(x.max()),
        num_points=len(x),
    )


def _of_losses(losses: NDArray[np.float64], a: float, b: float) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(np.clip(b * losses - a, -500.0, 500.0)))


def _sigmoid(value: float) -> float:
    return float(1.0 / (1.0 + np.exp(np.clip(-value, -500.0, 500.0))))


def _start(losses: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[float, float]:
    """A line through the scores' log odds, away from the ends."""
    inside = np.clip(scores, 0.01, 0.99)
    slope, height = np.polyfit(losses, np.log(inside / (1.0 - inside)), 1)
    return float(height), float(-slope)
