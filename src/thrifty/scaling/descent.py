"""BFGS for many small problems at once, each with its own line search.

Problems of five numbers or so need no limited memory: the inverse Hessians are [starts, p, p]. The
line search is the weak Wolfe bisection of Lewis and Overton (2013), with which BFGS also comes down
functions that are hardly smooth, as a sum of absolute errors. Problems wait for nobody: in one
evaluation some take a step, others narrow down theirs. (L-BFGS one start at a time, as SciPy has
it, takes several times as long, and fifty times where its BLAS threads compete for busy cores.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

EVALUATIONS = 300
ARMIJO, WOLFE = 1e-4, 0.9
FIRST_STEP = 0.1
"""Length of the first step, in the problem's own numbers (logarithms)."""
LEAST_STEP = 1e-10
LEAST_GAIN = 1e-11
"""Relative to the value, of two steps in a row."""


def minimise(
    evaluate: Callable[[Vector], tuple[Vector, Vector]], starts: Vector
) -> tuple[Vector, Vector]:
    """Local minima [starts, p] and their values; ``evaluate`` gives values and gradients."""
    x = np.array(starts, dtype=np.float64)
    count, size = x.shape
    identity = np.broadcast_to(np.eye(size), (count, size, size))
    value, gradient = _evaluate(evaluate, x)
    inverse = _scaled(identity, FIRST_STEP / np.maximum(_length(gradient), 1e-300))
    fresh = np.ones(count, dtype=bool)  # nothing learnt of the curvature yet
    done = ~np.isfinite(value)
    idle = np.zeros(count, dtype=int)
    step, low, high = np.ones(count), np.zeros(count), np.full(count, np.inf)
    for _ in range(EVALUATIONS):
        direction = -np.einsum("sij,sj->si", inverse, gradient)
        slope = _dot(gradient, direction)
        tried = x + step[:, None] * direction
        new_value, new_gradient = _evaluate(evaluate, tried)
        falls = new_value <= value + ARMIJO * step * slope
        far_enough = _dot(new_gradient, direction) >= WOLFE * slope
        taken = falls & far_enough & ~done

        moved, turned = tried - x, new_gradient - gradient
        curved = taken & (_dot(moved, turned) > 1e-300)
        start = _dot(moved, turned) / np.maximum(_dot(turned, turned), 1e-300)
        base = np.where((fresh & curved)[:, None, None], _scaled(identity, start), inverse)
        updated = _updated(base, moved, turned, curved)
        level = new_value >= value * (1 - LEAST_GAIN)
        idle = np.where(taken, np.where(level, idle + 1, 0), idle)

        narrow = step * _length(direction) < LEAST_STEP
        stuck = ~taken & ~done & narrow
        again = stuck & ~fresh  # what was learnt of the curvature misleads: begin anew
        done |= (stuck & fresh) | (idle >= 2)
        renewed = _scaled(identity, FIRST_STEP / np.maximum(_length(gradient), 1e-300))
        inverse = np.where(again[:, None, None], renewed, updated)
        fresh = np.where(again, True, fresh & ~curved)

        high = np.where(falls, high, step)
        low = np.where(falls & ~far_enough, step, low)
        middle = np.where(np.isinf(high), 2 * step, (low + high) / 2)
        begin = taken | again
        step, low, high = (
            np.where(begin, first, then)
            for first, then in ((1.0, middle), (0.0, low), (np.inf, high))
        )
        x = np.where(taken[:, None], tried, x)
        value = np.where(taken, new_value, value)
        gradient = np.where(taken[:, None], new_gradient, gradient)
        if done.all():
            break
    return x, value


def _evaluate(
    evaluate: Callable[[Vector], tuple[Vector, Vector]], x: Vector
) -> tuple[Vector, Vector]:
    """What is no number is higher than all."""
    with np.errstate(all="ignore"):  # a step too far; it is taken back
        value, gradient = evaluate(x)
    good = np.isfinite(value) & np.isfinite(gradient).all(axis=1)
    return np.where(good, value, np.inf), np.where(good[:, None], gradient, 0.0)


def _updated(inverse: Vector, moved: Vector, turned: Vector, which: NDArray[np.bool_]) -> Vector:
    """BFGS's inverse Hessians after a step, of those ``which`` took one that says something."""
    rho = 1.0 / np.where(which, _dot(moved, turned), 1.0)
    through = np.einsum("sij,sj->si", inverse, turned)
    cross = moved[:, :, None] * through[:, None, :]
    twice = (1.0 + rho * _dot(turned, through)) * rho
    change = twice[:, None, None] * moved[:, :, None] * moved[:, None, :]
    change = change - rho[:, None, None] * (cross + cross.transpose(0, 2, 1))
    return np.where(which[:, None, None], inverse + change, inverse)


def _scaled(matrices: Vector, by: Vector) -> Vector:
    return matrices * by[:, None, None]


def _dot(left: Vector, right: Vector) -> Vector:
    return np.einsum("si,si->s", left, right)


def _length(vectors: Vector) -> Vector:
    return np.sqrt(_dot(vectors, vectors))
