"""How a model's answers to one question spread: a mixture of Pitman-Yor processes.

Of n answers that fall into K classes with counts n_1..n_K, a process (alpha, d) gives the partition

    p(n_1..n_K) = prod_{i=1}^{K-1} (alpha + i d) / (alpha + 1)_{n-1}  prod_k (1 - d)_{n_k - 1}

(the Ewens-Pitman sampling formula; Pitman 1995, doi:10.1007/BF01213386), (x)_m the rising
factorial. The next answer is one of class k with probability (n_k - d) / (n + alpha), and a new one
with (alpha + d K) / (n + alpha): answers that were never seen are allowed for. Questions differ:
weights on a grid of processes say how, and are fitted to the questions seen so far by expectation
maximisation (empirical Bayes), each step of which cannot lower the likelihood.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Floats = NDArray[np.float64]

GRID = tuple((float(alpha), d) for alpha in 2.0 ** np.arange(-5, 6, 2) for d in (0.0, 0.3))
"""(alpha, d) of the components: from questions that are always answered alike to those that are
hardly ever."""

PSEUDO_QUESTIONS = 4.0
"""What the weights at the start count for beside the questions that were seen."""


@dataclass(frozen=True, eq=False)
class AnswerPrior:
    """Weights on ``GRID``."""

    weights: Floats

    @property
    def alpha(self) -> Floats:
        return _grid()[0]

    @property
    def d(self) -> Floats:
        return _grid()[1]

    def posterior(self, counts: Sequence[int]) -> Floats:
        """[len(GRID)]: of the components, given a question's counts."""
        return _posterior(self, tuple(sorted(counts)))

    def to_list(self) -> list[float]:
        return [round(float(weight), 6) for weight in self.weights]


def flat_prior() -> AnswerPrior:
    return AnswerPrior(np.full(len(GRID), 1 / len(GRID)))


def prior_from(weights: Sequence[float]) -> AnswerPrior:
    """What ``to_list`` wrote. Raises ValueError where it is no such thing."""
    found = np.array(weights, dtype=float)
    if found.shape != (len(GRID),) or not (found >= 0).all() or not found.sum() > 0:
        raise ValueError(
            f"how answers spread is {len(GRID)} weights of at least 0, not {list(weights)!r:.80}\n"
            "hint: fit the policy anew; another version of thrifty wrote it"
        )
    found = np.maximum(found, 1e-6)
    return AnswerPrior(found / found.sum())


def fit_prior(
    tallies: Iterable[Sequence[int]], start: AnswerPrior | None = None, rounds: int = 50
) -> AnswerPrior:
    """From the counts of each question's answers, beside ``start`` (flat); questions without a
    second readable answer tell nothing."""
    multiplicity: dict[tuple[int, ...], int] = {}
    for counts in tallies:
        if sum(counts) > 1:  # one answer is sure to be one class
            key = tuple(sorted(counts))
            multiplicity[key] = multiplicity.get(key, 0) + 1
    prior = start or flat_prior()
    if not multiplicity:
        return prior
    logs = np.array([log_partition(key) for key in multiplicity])
    likelihood = np.exp(logs - logs.max(axis=1, keepdims=True))
    times = np.array(list(multiplicity.values()), dtype=float)
    weights = prior.weights
    for _ in range(rounds):
        shares = likelihood * weights
        shares /= shares.sum(axis=1, keepdims=True)
        weights = times @ shares + PSEUDO_QUESTIONS * prior.weights
        weights /= weights.sum()
    return AnswerPrior(weights)


@lru_cache(maxsize=100_000)
def _posterior(prior: AnswerPrior, counts: tuple[int, ...]) -> Floats:
    logs = np.log(prior.weights) + log_partition(counts)
    found: Floats = np.exp(logs - logs.max())
    return found / found.sum()


@lru_cache(maxsize=100_000)
def log_partition(counts: tuple[int, ...]) -> Floats:
    """[len(GRID)]: log p of counts, each at least 1, in any order."""
    alpha, d = _grid()
    n, classes = sum(counts), len(counts)
    if not n:
        return np.zeros(len(GRID))
    places = np.arange(1, classes)[:, None]
    new = np.log(alpha + places * d).sum(axis=0)
    repeats = sum(gammaln(count - d) - gammaln(1 - d) for count in counts)
    found: Floats = new + repeats - (gammaln(alpha + n) - gammaln(alpha + 1))
    return found


@lru_cache(maxsize=1)
def _grid() -> tuple[Floats, Floats]:
    alpha, d = np.array(GRID).T
    return alpha, d
