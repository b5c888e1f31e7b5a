"""How far scores have moved since they were made, and what is believed after a second look.

    drift = 1 - Spearman(then, now)        over a probe of rows looked at both times
    z     = (score - median) / (1.4826 MAD)  each look by its own probe, since models in training
                                           score on a scale of their own
    belief = (1 - m) z_then + m z_now      m = momentum

A row that was not looked at again has for ``z_now`` what cheaper signals predict of it, which is
near the middle where they say little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, of normal numbers."""


@dataclass(frozen=True)
class Drift:
    """Of scores since they were made: 0 where their order is the same, 1 where it is unrelated, 2
    where it is turned round."""

    mean: float
    stderr: float


def drift(then: NDArray[np.floating], now: NDArray[np.floating]) -> Drift:
    """Of two looks at the same rows, [n, num_targets] each: the mean over targets, with the
    standard error of one rank correlation (Fieller et al. 1957: 1.03 / sqrt(n - 3) of its atanh).

    Rows that one of the looks did not reach do not count. With fewer than four the order is taken
    to be the same, and nothing to be known of it.
    """
    both = np.isfinite(then).all(axis=1) & np.isfinite(now).all(axis=1)
    size = int(both.sum())
    if size < 4:
        return Drift(0.0, 2.0)
    alike = [rank_correlation(then[both, t], now[both, t]) for t in range(then.shape[1])]
    mean = float(np.mean(alike))
    return Drift(1.0 - mean, max(1.0 - mean**2, 1 / size) * 1.03 / np.sqrt(size - 3))


def turn(then: NDArray[np.floating] | None, now: NDArray[np.floating] | None) -> float | None:
    """Of directions [num_targets, n]: 1 - cosine, the mean over targets; None where one of the
    looks has none."""
    if then is None or now is None:
        return None
    norms = np.linalg.norm(then, axis=1) * np.linalg.norm(now, axis=1)
    return float(1 - ((then * now).sum(axis=1) / np.maximum(norms, 1e-30)).mean())


def rank_correlation(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """Spearman's, ties at their mean rank; 1 where neither side tells rows apart, 0 where one
    does not."""
    one, two = _centred_ranks(left), _centred_ranks(right)
    norms = np.linalg.norm(one), np.linalg.norm(two)
    if not all(norms):
        return float(not any(norms))
    return float(one @ two / (norms[0] * norms[1]))


def _centred_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count - 1) / 2
    return middle[place] - (len(values) + 1) / 2


@dataclass(frozen=True)
class Scale:
    """Of one look's scores."""

    middle: NDArray[np.float64]  # [num_targets]
    spread: NDArray[np.float64]  # [num_targets]

    @classmethod
    def of(cls, scores: NDArray[np.floating]) -> Scale:
        """By rows drawn at random, [n, num_targets]; where they are all alike the spread is 1."""
        reached = scores[np.isfinite(scores).all(axis=1)].astype(np.float64)
        if not len(reached):
            return cls(np.zeros(scores.shape[1]), np.ones(scores.shape[1]))
        middle = np.median(reached, axis=0)
        spread = _NORMAL * np.median(np.abs(reached - middle), axis=0)
        plain = reached.std(axis=0)
        spread = np.where(spread > 0, spread, np.where(plain > 0, plain, 1.0))
        return cls(middle, spread)

    def standard(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        return (scores - self.middle) / self.spread

    def back(self, standard: NDArray[np.floating]) -> NDArray[np.float64]:
        return standard * self.spread + self.middle


@dataclass(frozen=True)
class Beliefs:
    """Of the rows of a pool."""

    scores: NDArray[np.float64]  # [num_rows, num_targets], standard
    reversals: int = 0
    """Looks that found the order turned round, after a choice by what was believed before."""

    def momentum(self, most: float) -> float:
        """The weight that the next look has. An order that turns round again and again is an
        answer to the choices themselves; then looks are averaged (weights 1, 1/2, 1/3 ... of
        ``most``), which comes to rest between them."""
        return most / (1 + self.reversals)

    def after(self, now: NDArray[np.floating], moved: Drift, most: float) -> Beliefs:
        """Another look's standard scores, by which they have ``moved``."""
        believed = mixed(self.scores, now, self.momentum(most))
        return Beliefs(believed, self.reversals + (moved.mean > 1))


def mixed(
    then: NDArray[np.floating], now: NDArray[np.floating], momentum: float
) -> NDArray[np.float64]:
    """What is believed after both looks, standard scores [n, num_targets]. What one did not reach
    is as the other has it."""
    believed = (1.0 - momentum) * then + momentum * now
    return np.where(np.isnan(then), now, np.where(np.isnan(now), then, believed))
