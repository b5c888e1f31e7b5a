"""What a cool-down brings, fitted on recorded runs: the multi-power law by least squares, a model
size at a time, for the prior of another size (`bench/forecasts.py`, table heldout)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from recorded_curves import Curve
from thrifty.scaling.annealing import CoolDown, annealed

EVERY = 8
"""Of a curve's evaluations one in so many is fitted."""
START = (-0.05, -2.0, 0.5, -3.0, 3.0, 2.0, 0.6)
LEAST_BOUND = (-0.5, -8.0, 0.05, -8.0, -1.0, 0.3, 0.1)
MOST_BOUND = (0.0, 1.0, 2.0, 0.0, 7.0, 4.0, 1.2)
HUBER = 1e-3


def fit_law(curves: Sequence[Curve]) -> np.ndarray:
    """L0 as a share of the loss less 1, ln of A's share, alpha, ln of B's share, ln C, beta, gamma:
    of all schedules at one size, the loss being the mean of the curves' last ones."""
    level = np.mean([curve.losses[-1] for curve in curves])
    most = max(curve.shares.sum() for curve in curves)

    def miss(p: np.ndarray) -> np.ndarray:
        cool_down = CoolDown(beta=p[5], gamma=p[6])
        found = []
        for curve in curves:
            steps, losses = curve.steps[::EVERY], curve.losses[::EVERY]
            summed = np.cumsum(curve.shares)[steps - 1] / most
            fallen = annealed(curve.shares, steps, cool_down, float(np.exp(p[4])))
            law = 1 + p[0] + np.exp(p[1]) * summed ** -p[2] - np.exp(p[3]) * fallen
            found.append(level * law / losses - 1)
        return np.concatenate(found)

    bounds = (LEAST_BOUND, MOST_BOUND)
    return least_squares(miss, START, bounds=bounds, loss="huber", f_scale=HUBER).x


def prior_without(curves: Sequence[Curve], size: float) -> CoolDown:
    """The prior for ``size``, from the others: B's share of the loss a power of the model's size
    through those two, its error half of what lies between them; the shape their mean."""
    sizes = sorted({curve.size for curve in curves} - {size})
    fits = np.array([fit_law([c for c in curves if c.size == s]) for s in sizes])
    slope, start = np.polyfit(np.log(sizes), fits[:, 3], 1)
    gain = float(np.exp(start + slope * np.log(size)))
    rate = float(np.exp(fits[:, 4].mean()))
    return CoolDown(
        gain=gain,
        gain_stderr=float(np.ptp(np.exp(fits[:, 3])) / 2),
        rates=(rate / 2, rate, 2 * rate),
        beta=float(fits[:, 5].mean()),
        gamma=float(fits[:, 6].mean()),
        source=f"arXiv:2503.12811 without {size:g}M",
    )
