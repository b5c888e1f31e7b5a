"""What k more answers to a question are worth: how much likelier its vote becomes right.

A vote gains only where it flips. With n_a answers for the leader, n_b for a challenger, and x and y
more for b and a among the next k, under a process (alpha, d) of ``answer_prior``

    P(x, y) = k! / (x! y! z!)  (n_b - d)_x (n_a - d)_y (R)_z / (n + alpha)_k,   z = k - x - y,
    R = n + alpha - (n_a - d) - (n_b - d),

and for all challengers that were never seen together (alpha + d K) (1 - d)_{x-1} in the place of
(n_b - d)_x, R without n_b. Where b ends ahead, what is gained is P(b right) - P(a right), of

    P(a right) = v_a^s / (sum_b v_b^s + none),

v the shares of the votes: s sharper or flatter than "as often right as it is said" (s = 1), and
``none`` for questions whose right answer nobody says (a conditional logit, fitted where gold
answers are known). The gains of single challengers are added up, which overstates what several that
come from behind at once would bring. So hopeless questions, whose answers are all alike unlikely,
gain little by a flip, and settled ones do not flip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from thrifty.scaling.answer_prior import GRID, AnswerPrior

Floats = NDArray[np.float64]

_MOST = 512
"""Answers to a question that the tables are made for; of more the shares alone count."""


@dataclass(frozen=True)
class Rightness:
    """How the odds that an answer is right go with its share of the votes."""

    sharpness: float = 1.0
    """s"""
    none: float | None = None
    """Odds that no answer given is right, beside sum v^s = 1; None: those of an unseen answer."""

    def of(self, counts: Sequence[int], unseen: float) -> Floats:
        """P(right) of each answer. ``unseen``: odds of an answer not seen yet."""
        shares = np.asarray(counts, dtype=float) / sum(counts)
        weights = shares**self.sharpness
        found: Floats = weights / (weights.sum() + (unseen if self.none is None else self.none))
        return found


def unseen_odds(counts: Sequence[int], posterior: Floats) -> float:
    """Of an answer not seen yet, against the seen ones as they are counted."""
    return float(posterior @ _appears(len(counts))[:, 0]) / sum(counts)


def gains(
    counts: Sequence[int],
    prior: AnswerPrior,
    rightness: Rightness,
    looks: tuple[int, ...],
) -> Floats:
    """[len(looks)]: the expected gain in P(the vote is right) from so many more answers.

    ``counts``: of each readable answer so far, one at least.
    """
    ordered = sorted(counts, reverse=True)
    n, classes, leader = sum(ordered), len(ordered), ordered[0]
    posterior = prior.posterior(ordered)
    by_d = posterior * _of_d()
    s = rightness.sharpness
    none = unseen_odds(ordered, posterior) if rightness.none is None else rightness.none
    powers = (np.array(ordered) / n) ** s
    others = float(powers.sum()) + none - float(powers[0])
    found = np.zeros(len(looks))
    for count, times in [*Counter(ordered[1:]).items(), (0, 1)]:  # 0: any that was never seen
        if leader - count > looks[-1]:
            continue
        pair = _pair(leader, count, looks)
        b, a = _shares(leader, count, n, s, looks)
        rest = max(others - ((count / n) ** s if count else 0.0), 0.0)
        brought = np.maximum(b - a, 0.0) / (b + a + rest)
        by_both = np.add.reduceat(pair.splits * brought, pair.starts, axis=1)
        odds = _both(leader, count, n, looks)
        if not count:
            odds = odds * _appears(classes)
        mixed = ((by_d @ odds) * by_both).sum(axis=0)
        found += times * np.add.reduceat(mixed, _look_starts(looks))
    return found


# A challenger and the leader get m = x + y of k answers together, and x of m go to the challenger:
# of the first alpha knows, of the second it does not, so that a table of the one serves all.


@dataclass(frozen=True, eq=False)
class _Pair:
    """How m answers split between a challenger and the leader, for every look k and m <= k."""

    splits: Floats  # [d, cells]: m! / (x! y!) (n_b - d)_x (n_a - d)_y
    starts: NDArray[np.intp]  # [sum of k + 1]: the first cell of each (k, m)


@lru_cache(maxsize=64)
def _cells(looks: tuple[int, ...]) -> tuple[NDArray[np.intp], ...]:
    """x and y of each cell, the k of its look, and where each (k, m) starts."""
    columns: list[list[int]] = [[], [], []]
    starts = []
    for k in looks:
        for m in range(k + 1):
            starts.append(len(columns[0]))
            columns[0] += range(m + 1)
            columns[1] += range(m, -1, -1)
            columns[2] += [k] * (m + 1)
    x, y, of = (np.array(column) for column in columns)
    return x, y, of, np.array(starts)


@lru_cache(maxsize=64)
def _look_starts(looks: tuple[int, ...]) -> NDArray[np.intp]:
    return np.cumsum([0] + [k + 1 for k in looks[:-1]])


@lru_cache(maxsize=20_000)
def _pair(leader: int, challenger: int, looks: tuple[int, ...]) -> _Pair:
    x, y, _, starts = _cells(looks)
    log, d = _tables(), np.array(_DS)[:, None]
    both = log.factorial[x + y] - log.factorial[x] - log.factorial[y]
    both = both + gammaln(leader - d + y) - gammaln(leader - d)
    if challenger:
        both += gammaln(challenger - d + x) - gammaln(challenger - d)
    else:  # what appears for the first time does so at other odds
        both += gammaln(np.maximum(x, 1) - d) - gammaln(1 - d)
    splits = np.exp(both)
    if not challenger:
        splits[:, x == 0] = 0.0
    return _Pair(splits, starts)


@lru_cache(maxsize=20_000)
def _shares(
    leader: int, challenger: int, n: int, s: float, looks: tuple[int, ...]
) -> tuple[Floats, Floats]:
    """[cells]: the powers s of the shares that the two end with."""
    x, y, k, _ = _cells(looks)
    return ((challenger + x) / (n + k)) ** s, ((leader + y) / (n + k)) ** s


@lru_cache(maxsize=20_000)
def _both(leader: int, challenger: int, n: int, looks: tuple[int, ...]) -> Floats:
    """[len(GRID), sum of k + 1]: k! / (m! z!) (R)_z / (n + alpha)_k."""
    k = np.concatenate([np.full(k + 1, k) for k in looks])
    m = np.concatenate([np.arange(k + 1) for k in looks])
    log, z, rest = _tables(), k - m, n - leader - challenger
    both = log.factorial[k] - log.factorial[m] - log.factorial[z]
    both = both + log.rest[:, rest + z] - log.rest[:, [rest]]
    both -= log.alpha[:, n + k] - log.alpha[:, [n]]
    found: Floats = np.exp(both)
    return found


@lru_cache(maxsize=512)
def _appears(classes: int) -> Floats:
    """[len(GRID), 1]: the weight of an answer that was never seen."""
    alpha, d = np.array(GRID).T
    found: Floats = (alpha + d * classes)[:, None]
    return found


@dataclass(frozen=True, eq=False)
class _Tables:
    """Logarithms of gamma functions of whole numbers m, and of those beside a component's own."""

    factorial: Floats  # [m]: of m + 1
    alpha: Floats  # [len(GRID), m]: of m + alpha
    rest: Floats  # of m + alpha + 2 d


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    alpha, d = (column[:, None] for column in np.array(GRID).T)
    m = np.arange(2 * _MOST + 1, dtype=float)
    return _Tables(
        factorial=gammaln(m + 1),
        alpha=gammaln(m + alpha),
        rest=gammaln(m + alpha + 2 * d),
    )


_DS = tuple(dict.fromkeys(d for _, d in GRID))


@lru_cache(maxsize=1)
def _of_d() -> Floats:
    """[len(_DS), len(GRID)]: 1 where a component has that d, else 0."""
    return np.array([[float(own == d) for _, own in GRID] for d in _DS])
