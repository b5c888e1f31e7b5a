"""Filtered data under repetition: how strictly to filter depends on the compute (arXiv:2404.07177).

    dy / dn = -b_k (y - E) / n in epoch k,   b_k = b (1/2)^((k - 1) / tau)
    L(D, U) = E + A D_1^-b_1 (D_2 / D_1)^-b_2 (D_3 / D_2)^-b_3 ...

D = tokens (or samples) seen, U = those of the pool, D_k = those seen by the end of epoch k, b = the
pool's utility, tau = its half-life in repeats. Pools of equal size that are mixed have the mean of
their utilities epoch by epoch, and each lives as many times longer as there are pools, since it
repeats so much later. A strict filter has the larger b and repeats sooner: with enough compute a
wider one is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.scaling.descent import Vector
from thrifty.scaling.huber import coefficients, fit, fit_each, log_sum
from thrifty.scaling.laws import MOST_REPEATS, Number, limit_of
from thrifty.scaling.points import Points

UTILITIES = np.arange(0.05, 0.65, 0.05)
HALF_LIVES = (0.5, 2.0, 8.0, 32.0)
"""Tried for each term as starts."""
MOST_EPOCHS = 10_000


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """Loss of a pool's tokens, seen again and again."""

    E: Number
    A: Number
    b: Number
    tau: Number = np.inf

    def loss(self, D: Number, unique: Number) -> Number:
        """``D`` and ``unique``: a float, or one for each law."""
        growth = log_growth(np.atleast_1d(D), np.atleast_1d(unique))
        found = self.E + self.A * np.exp(-self.b * worn(self.tau, growth))
        return found if np.ndim(D) or np.ndim(self.tau) else found[0]


def mixed_loss(pools: Sequence[Filtered], unique: float, D: float, scale: float = 1.0) -> float:
    """Of ``D`` tokens of a mixture of ``pools`` with ``unique`` each, E and A those of the first;
    at ``scale`` tokens all are taken to be alike.

    Raises ValueError for amounts that are not positive.
    """
    if not pools or not (unique > 0 and D > 0 and scale > 0):
        raise ValueError(
            "a mixture needs pools, and more than no tokens\nhint: unique=12.8e6, D=128e6"
        )
    growth = log_growth(np.array([D / scale]), np.array([unique / scale * len(pools)]))
    decline = sum(pool.b * worn(pool.tau * len(pools), growth)[0] for pool in pools) / len(pools)
    return float(pools[0].E + pools[0].A * np.exp(-decline))


def best_mixture(pools: Sequence[Filtered], unique: float, D: float, scale: float = 1.0) -> int:
    """How many of the best pools to mix for ``D`` tokens seen; ties go to the fewer."""
    ranked = sorted(pools, key=lambda pool: -float(pool.b))
    counts = range(1, len(ranked) + 1)
    return min(counts, key=lambda count: mixed_loss(ranked[:count], unique, D, scale))


def log_growth(D: Vector, unique: Vector) -> Vector:
    """log of the tokens seen by the end of each epoch over those before it, [n, epochs]; from one
    token on, zero after the last epoch."""
    epochs = np.ceil(D / unique * (1 - 1e-12))
    count = int(max(epochs.max(), 1))
    if count > MOST_EPOCHS:
        raise ValueError(
            f"{count:,} epochs are more than this law can be asked for\nhint: more unique tokens"
        )
    ends = np.minimum(np.arange(1, count + 1) * unique[:, None], D[:, None])
    logs = np.log(np.maximum(ends, 1e-300))
    return np.diff(logs, axis=1, prepend=0.0)


def worn(tau: Number, growth: Vector) -> Vector:
    """What the growth of each row counts for with its repeats: [n], or one for each law."""
    repeats = np.arange(growth.shape[1])
    found: Vector = (growth * 0.5 ** (repeats / np.asarray(tau)[..., None])).sum(axis=-1)
    return found


def predict(x: Vector, growth: Vector) -> tuple[Vector, Vector]:
    """log L, [starts, n], and its derivatives, [starts, n, 4]; the free numbers are (log E, log A,
    log b, log tau)."""
    log_E, log_A = x[:, :1], x[:, 1:2]
    b, tau = np.exp(x[:, 2:3]), np.exp(x[:, 3:])
    repeats = np.arange(growth.shape[1])
    left = 0.5 ** (repeats / tau)  # [starts, epochs]
    counted = np.einsum("ne,se->sn", growth, left)
    longer = np.einsum("ne,se->sn", growth, left * repeats) * np.log(2) / tau  # by log tau
    log_loss, shares = log_sum(np.stack([log_E + 0.0 * counted, log_A - b * counted]))
    slopes = [shares[0], shares[1], -shares[1] * b * counted, -shares[1] * b * longer]
    return log_loss, np.stack(slopes, axis=2)


def fit_filtered(points: Points, weights: Vector, near: Filtered | None) -> Filtered:
    """For ``weights`` [n], or a law for each of [draws, n] from ``near``.

    Raises ValueError where the loss does not fall.
    """
    growth, log_loss = log_growth(points.D, points.unique), points.log_loss
    if near is not None:
        start = np.log([near.E, near.A, near.b, min(near.tau, MOST_REPEATS)])
        first = np.broadcast_to(start, (len(weights), 4))
        x = fit_each(lambda x: predict(x, growth), first, log_loss, weights).T
    else:
        first = _starts(growth, log_loss, weights)
        x = fit(lambda x: predict(x, growth), first, log_loss, weights)
    E, A, b = np.exp(x[:3])
    return Filtered(E=E, A=A, b=b, tau=limit_of(x[3]))


def _starts(growth: Vector, log_loss: Vector, weights: Vector) -> Vector:
    found = []
    for tau in HALF_LIVES:
        counted = worn(tau, growth)
        for b in UTILITIES:
            feature = np.exp(-b * (counted - counted.mean()))
            features = np.stack([np.ones_like(log_loss), feature], axis=1)
            numbers = coefficients(features, log_loss, weights)
            if numbers is not None:
                log_E, log_A = np.log(numbers)
                found.append([log_E, log_A + b * counted.mean(), np.log(b), np.log(tau)])
    if not found:
        raise ValueError(
            "the loss does not fall with the tokens, so that no law of repeats fits it\n"
            "hint: runs on one pool's tokens, some of which go through them several times"
        )
    return np.array(found)
