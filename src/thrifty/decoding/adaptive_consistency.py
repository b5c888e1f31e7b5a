"""Adaptive-Consistency: sample until the answer given most often is likely the model's favourite.

With a uniform prior on how the model's answers spread, n_1 >= n_2 >= ... of each seen so far, it
stops where

    beta        P(p_1 > p_2)             >= threshold,  (p_1, p_2) ~ Beta(n_1 + 1, n_2 + 1)
    dirichlet   P(p_1 > p_j for all j)   >= threshold,  p ~ Dirichlet(n_1 + 1, n_2 + 1, ...)

(arXiv:2305.11860). Both are worked out without sampling: the first is the tail of a binomial
distribution,

    P(p_1 > p_2) = P(X <= n_1),   X ~ Binomial(n_1 + n_2 + 1, 1/2)

and the second one integral, p being gamma variables over their sum:

    P(p_1 > p_j for all j) = int f(g; n_1 + 1) prod_j F(g; n_j + 1) dg

Answers that were never seen are not allowed for, but that there are two at least. As many samples
are drawn at once as it would take to stop were they all for the leader: fewer cannot.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, gammainc, gammaln, xlogy

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, vote

Floats = NDArray[np.float64]
_NUM_NODES = 96


@dataclass(frozen=True, kw_only=True)
class AdaptiveConsistency(DecodingPolicy):
    """Sample until the leading answer is the model's favourite, as likely as the threshold says."""

    threshold: float = 0.95
    criterion: Literal["beta", "dirichlet"] = "beta"
    """Against the runner-up alone, or against every answer that was seen."""
    samples: int = 40
    """At most."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2305.11860"

    def __post_init__(self) -> None:
        check_ranges(self, threshold=(0.5, 1.0), samples=(1, math.inf))

    def decide(self, asked: Asked, means: Means) -> Action:
        counts = sorted(asked.counts.values(), reverse=True)
        most, next_most = (*counts, 0, 0)[:2]
        wanted = min(self.samples, means.max_samples)
        left = wanted - asked.num_drawn
        # That it beats one is likelier than that it beats all: this holds for both criteria.
        missing = _missing(most, next_most, self.threshold)
        if most and not missing:
            sure = ahead_of_next(most, next_most)
            if self.criterion == "dirichlet":
                sure = ahead_of_all(tuple(counts))
            if sure >= self.threshold:
                return vote(asked, f"the leading answer is the favourite with odds of {sure:.3f}")
        if left <= 0:
            return vote(asked, f"{wanted} samples, unsettled")
        count = min(max(missing, 1), left)
        return Draw(model=self.model or means.offers[0].model, count=count)


@lru_cache(maxsize=1 << 16)
def _missing(most: int, next_most: int, threshold: float) -> int:
    """Further answers for the leader until it is ahead of the next as likely as that."""
    missing = 0
    while ahead_of_next(most + missing, next_most) < threshold:
        missing += 1
    return missing


@lru_cache(maxsize=1 << 16)
def ahead_of_next(most: int, next_most: int) -> float:
    """P(p_1 > p_2) of two answers that were given so often."""
    return float(bdtr(most, most + next_most + 1, 0.5))


@lru_cache(maxsize=1 << 16)
def ahead_of_all(counts: tuple[int, ...]) -> float:
    """P(p_1 > p_j for all j) of answers that were given so often, the most frequent first."""
    if len(counts) < 3:
        return ahead_of_next(*(*counts, 0)[:2])
    weights = _density(counts[0])
    for count, times in Counter(counts[1:]).items():
        weights = weights * _below(counts[0], count) ** times
    return float(weights.sum())


@lru_cache(maxsize=1 << 10)
def _nodes(most: int) -> tuple[Floats, Floats]:
    """Where a gamma variable of shape ``most + 1`` may lie, and Gauss-Legendre weights there; what
    is left out is below 1e-12."""
    reach = 9.0 * math.sqrt(most + 1) + 30.0
    lowest, highest = max(0.0, most + 1 - reach), most + 1 + reach
    places, weights = np.polynomial.legendre.leggauss(_NUM_NODES)
    half = (highest - lowest) / 2
    return lowest + half * (places + 1), half * weights


@lru_cache(maxsize=1 << 10)
def _density(most: int) -> Floats:
    """Of the leader's variable, times the nodes' weights."""
    places, weights = _nodes(most)
    found: Floats = weights * np.exp(xlogy(most, places) - places - gammaln(most + 1))
    return found


@lru_cache(maxsize=1 << 12)
def _below(most: int, count: int) -> Floats:
    """The chance that the variable of an answer given ``count`` times is less than the leader's."""
    found: Floats = gammainc(count + 1, _nodes(most)[0])
    return found
