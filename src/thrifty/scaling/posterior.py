"""A learning curve's posterior: a small mixture of Gaussian processes, solved on a grid.

    L(t) = L0 + A ((S + s0) / (S_n + s0))^-alpha - LD(t) + w(ln(S + s0)) + noise

S: the learning rate summed by then, as shares of its peak (``learning_rate.py``); S_n: at the last
evaluation; LD: what letting it down brings (``annealing.py``); the first three are the multi-power
law of arXiv:2503.12811. w: an integrated random walk, by which real curves leave any law, so that
far from the last evaluation the error grows as it should. L0, A, B are linear and have Gaussian
priors in units of the loss; alpha, s0, the sizes of w and of the noise, and the shape of LD stand
on grids weighed by their evidence. No start to choose, nothing that fails to converge, no random
number: the same history gives the same forecast. n evaluations, at most 16, cost 162 solves of
n x n; six times as many once the rate has begun to fall.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, sqrt
from typing import TYPE_CHECKING

import numpy as np

from thrifty.scaling.annealing import CoolDown, annealed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ALPHAS = np.array([0.05, 0.15, 0.3, 0.5, 0.8, 1.3])
TYPICAL_ALPHA, ALPHA_SPREAD = 0.5, 0.5
"""Log-normal: 0.46 to 0.52 on the runs of arXiv:2503.12811, 0.1 to 0.6 on others."""
OFFSETS = (0.02, 0.4, 2.0)
"""s0, in units of S at the first evaluation after the start."""
WANDERINGS = np.array([0.02, 0.1, 0.4])
"""Size of w, in units of the curve's slope over ln S."""
NOISES = np.array([3e-4, 1.2e-3, 5e-3])
"""Of an evaluation, beside its standard error, as a share of the loss; seeds differ by 3e-4."""
MOST_GROWN = 3.0
"""e-foldings of S over which what a cool-down brings may go on changing."""
EXCESS, EXCESS_STDERR = 0.15, 0.3
"""A, as a share of the loss."""
WINDOW, LEAST, MOST = 5.0, 6, 16
"""Evaluations older than S_n / 5 are left out, unless of the last six; more than 16 are averaged,
neighbours with each other."""


@dataclass(frozen=True)
class Posterior:
    """Of the losses at F futures: a mixture of Gaussians."""

    weights: Floats
    """[g]"""
    means: Floats
    """[g, F]"""
    covariances: Floats
    """[g, F, F]"""
    noise: float
    """Standard deviation of a single evaluation about the curve."""

    def loss(self, future: int) -> tuple[float, float]:
        """Mean and standard error."""
        pick = np.zeros(self.means.shape[1])
        pick[future] = 1.0
        return self._moments(pick)

    def gain(self, near: int, far: int) -> tuple[float, float]:
        """Mean and standard error of what future ``far`` has less loss than ``near``."""
        return self._moments(self._difference(near, far))

    def odds(self, near: int, far: int, above: float = 0.0) -> float:
        """P(that gain is more than ``above``)."""
        means, variances = self._of(self._difference(near, far))
        z = (above - means) / np.sqrt(np.maximum(variances, 1e-300))
        return float(self.weights @ [erfc(each / sqrt(2.0)) / 2.0 for each in z])

    def _difference(self, near: int, far: int) -> Floats:
        pick = np.zeros(self.means.shape[1])
        pick[near] += 1.0
        pick[far] -= 1.0
        return pick

    def _of(self, pick: Floats) -> tuple[Floats, Floats]:
        return self.means @ pick, np.einsum("f,gfh,h->g", pick, self.covariances, pick)

    def _moments(self, pick: Floats) -> tuple[float, float]:
        means, variances = self._of(pick)
        mean = float(self.weights @ means)
        variance = float(self.weights @ (variances + (means - mean) ** 2))
        return mean, sqrt(max(variance, 0.0))


def condition(
    steps: NDArray[np.int64],
    losses: Floats,
    errors: Floats,
    courses: Sequence[Floats],
    cool_down: CoolDown,
) -> Posterior:
    """The losses at the end of each of ``courses``, given those measured so far.

    steps, losses, errors: [n], n >= 2, errors with 0 where unknown. courses: the shares of the
    learning rate at every step from the first on; they agree up to the last of ``steps``.
    """
    past = courses[0][: steps[-1]]
    summed = np.concatenate([[0.0], np.cumsum(past)])[steps]
    ahead = np.array([course.sum() for course in courses])
    recent = summed >= summed[-1] / WINDOW
    recent[-LEAST:] = True
    steps, losses, errors, summed = (a[recent] for a in (steps, losses, errors, summed))
    first = float(next((s for s in summed if s > 0), 1.0))
    groups = _groups(np.log(summed + first))
    seen = _Seen(
        losses=np.array([losses[g].mean() for g in groups]),
        # The errors are of changes, from one evaluation to the next: each has half of the square.
        variances=np.array([(errors[g] ** 2).mean() / len(g) / 2 for g in groups]),
        counts=np.array([len(g) for g in groups], float),
    )
    level = max(abs(float(losses[-1])), 0.1 * float(np.ptp(losses)), 1e-9)
    done = [_annealed(steps, groups, courses, cool_down, rate) for rate in cool_down.rates]
    grown = np.log(np.maximum(ahead, 1e-9) / max(float(summed[-1]), 1e-9))
    later = np.concatenate([np.zeros(len(groups)), np.clip(grown, 0.0, MOST_GROWN)])
    falls = [
        _fall(each, later, level, cool_down, drift)
        for each, drift in itertools.product(done, cool_down.drift)
    ]
    begun = any(fall.mean[: len(groups)].any() for fall in falls)
    parts = [
        _solve(seen, curve, fall, level)
        for curve in (
            _curve(summed, groups, ahead, first * offset, seen.losses, level) for offset in OFFSETS
        )
        for fall in (falls if begun else (None,))
    ]
    if not begun:  # then it is independent of what was seen
        parts = [part.with_fall(fall, len(groups)) for part in parts for fall in falls]
    return _mixed(parts)


def _groups(place: Floats) -> list[NDArray[np.int64]]:
    """Neighbours on the axis ``place``, in at most MOST groups."""
    if len(place) <= MOST:
        return [np.array([i]) for i in range(len(place))]
    edges = np.linspace(place[0], place[-1], MOST + 1)[1:-1]
    which = np.searchsorted(edges, place, side="right")
    return [np.flatnonzero(which == i) for i in range(MOST) if (which == i).any()]


@dataclass(frozen=True)
class _Seen:
    losses: Floats
    variances: Floats
    counts: Floats


@dataclass(frozen=True)
class _Fall:
    """What letting the rate down does to the losses seen and to come: [N], [N, N], N = n + F."""

    mean: Floats
    covariance: Floats


@dataclass(frozen=True)
class _Curve:
    """Without it: [alphas, N] and [alphas, wanderings, N, N], with the prior's log weights."""

    mean: Floats
    covariance: Floats
    log_prior: Floats


@dataclass(frozen=True)
class _Part:
    """Posteriors of one offset and fall: [g, F], [g, F, F]; their log evidence and noise [g]."""

    log_evidence: Floats
    means: Floats
    covariances: Floats
    noises: Floats

    def with_fall(self, fall: _Fall, n: int) -> _Part:
        return _Part(
            self.log_evidence,
            self.means + fall.mean[n:],
            self.covariances + fall.covariance[n:, n:],
            self.noises,
        )


def _annealed(
    steps: NDArray[np.int64],
    groups: Sequence[NDArray[np.int64]],
    courses: Sequence[Floats],
    cool_down: CoolDown,
    rate: float,
) -> Floats:
    past = annealed(courses[0][: steps[-1]], steps, cool_down, rate)
    ends = [annealed(c, np.array([len(c)]), cool_down, rate)[0] for c in courses]
    return np.array([*(past[group].mean() for group in groups), *ends])


def _fall(done: Floats, later: Floats, level: float, cool_down: CoolDown, drift: float) -> _Fall:
    brought = np.outer(done, done) * (cool_down.gain_stderr * level) ** 2
    grown = done * later * cool_down.growth * level
    return _Fall(
        mean=-cool_down.gain * level * done,
        covariance=brought + np.outer(grown, grown) + (drift * level) ** 2 * integrated_walk(done),
    )


def _curve(
    summed: Floats,
    groups: Sequence[NDArray[np.int64]],
    ahead: Floats,
    offset: float,
    losses: Floats,
    level: float,
) -> _Curve:
    place = np.log(summed + offset)
    middle = np.array([place[g].mean() for g in groups])
    later = np.log(ahead + offset)
    powers = np.exp(-ALPHAS[:, None] * (place - place[-1]))
    excess = np.concatenate(
        [
            np.stack([powers[:, g].mean(axis=1) for g in groups], axis=1),
            np.exp(-ALPHAS[:, None] * (later - place[-1])),
        ],
        axis=1,
    )
    recent = middle >= middle[0] + 0.3 * (middle[-1] - middle[0])
    width = float(np.ptp(middle[recent]))
    slope = float(np.ptp(losses[recent])) / width if width > 0 else 0.0
    walk = integrated_walk(np.concatenate([middle, later]) - middle[0])
    sizes = (WANDERINGS * max(slope, 1e-3 * level)) ** 2
    linear = level**2 + (EXCESS_STDERR * level) ** 2 * excess[:, :, None] * excess[:, None, :]
    return _Curve(
        mean=losses[-1] + EXCESS * level * (excess - 1),
        covariance=linear[:, None] + sizes[:, None, None] * walk,
        log_prior=-0.5 * (np.log(ALPHAS / TYPICAL_ALPHA) / ALPHA_SPREAD) ** 2,
    )


def integrated_walk(place: Floats) -> Floats:
    """[N, N]: covariance of an integrated random walk of unit size that starts at 0, at rest."""
    place = np.maximum(place, 0.0)
    nearer = np.minimum(place[:, None], place[None])
    apart = np.abs(place[:, None] - place[None])
    return np.asarray(nearer**3 / 3 + nearer**2 * apart / 2)


def _solve(seen: _Seen, curve: _Curve, fall: _Fall | None, level: float) -> _Part:
    n = len(seen.losses)
    mean, covariance = curve.mean, curve.covariance
    if fall is not None:
        mean, covariance = mean + fall.mean, covariance + fall.covariance
    covariance = covariance[:, :, None]  # [alphas, wanderings, noises, N, N] from here on
    noises = (NOISES * level) ** 2
    own = noises[:, None] / seen.counts + seen.variances + 1e-14 * level**2
    root = np.linalg.cholesky(covariance[..., :n, :n] + own[:, :, None] * np.eye(n))
    grid = root.shape[:3]
    off = np.broadcast_to((seen.losses - mean[:, :n])[:, None, None, :, None], (*grid, n, 1))
    across = np.broadcast_to(covariance[..., :n, n:], (*grid, n, covariance.shape[-1] - n))
    solved = np.linalg.solve(root, np.concatenate([off, across], axis=-1))
    residual, reach = solved[..., 0], solved[..., 1:]
    evidence = -0.5 * (residual**2).sum(-1)
    evidence = evidence - np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    means = mean[:, None, None, n:] + np.einsum("...nf,...n->...f", reach, residual)
    covariances = covariance[..., n:, n:] - np.swapaxes(reach, -1, -2) @ reach
    one = np.broadcast_to(np.sqrt(noises + np.median(seen.variances)), grid)
    ahead = means.shape[-1]
    return _Part(
        (evidence + curve.log_prior[:, None, None]).ravel(),
        means.reshape(-1, ahead),
        covariances.reshape(-1, ahead, ahead),
        one.ravel(),
    )


def _mixed(parts: Sequence[_Part]) -> Posterior:
    evidence = np.concatenate([part.log_evidence for part in parts])
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    return Posterior(
        weights,
        np.concatenate([part.means for part in parts]),
        np.concatenate([part.covariances for part in parts]),
        float(weights @ np.concatenate([part.noises for part in parts])),
    )
