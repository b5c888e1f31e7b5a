"""How often a vote over K samples is right, from m samples a question whose gold answers are known.

    K <= m    the mean over all subsets of K of the m samples: which answer leads each, an equal
              share to those that lead together (the one that came first answers, and each is as
              likely to have). Unbiased for K samples of the model.
    K > m     that of all m, and what K - m more are expected to bring (``vote_gain.py``), how
              answers spread and how often a vote is right fitted to these questions themselves

Of n_r samples that say the right answer x are among K, of another answer fewer than x or, tied,
just as many, and of the unreadable ones any number:

    C(n, K) P(right) = sum_x C(n_r, x) sum_t [z^(K-x) y^t] (1 + z)^unreadable
                       prod_(others) (sum_(i<x) C(n_o, i) z^i + y C(n_o, x) z^x) / (t + 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import comb

from thrifty.core.sampling import Outcome
from thrifty.scaling.answer_prior import AnswerPrior, fit_prior
from thrifty.scaling.rightness import fit_rightness
from thrifty.scaling.vote_gain import Rightness, gains

Floats = NDArray[np.float64]


def vote_sizes(most: int) -> tuple[int, ...]:
    """Samples that a curve is worked out for, up to ``most``, a quarter more each time."""
    found = [1]
    while found[-1] < most:
        found.append(min(max(found[-1] + 1, found[-1] * 5 // 4), most))
    return tuple(found)


def vote_accuracy(outcomes: Sequence[Outcome], sizes: Sequence[int]) -> Floats:
    """[questions, sizes]: that each one's vote is right. A question without a sample is wrong."""
    prior = fit_prior(outcome.tally() for outcome in outcomes)
    fitted = fit_rightness(outcomes)
    rightness = Rightness(fitted.get("sharpness", 1.0), fitted.get("none"))
    found = [_of_question(outcome, tuple(sizes), prior, rightness) for outcome in outcomes]
    return np.array(found).reshape(len(outcomes), len(sizes))


def right_votes(counts: Sequence[int], right: Sequence[bool], unreadable: int) -> Floats:
    """[m + 1]: that a vote of 0, 1, ... m of these samples is right. ``counts``: of each answer;
    ``right``: which of them are."""
    found = np.zeros(sum(counts) + unreadable + 1)
    for place, count in enumerate(counts):
        if right[place]:
            others = tuple(sorted((*counts[:place], *counts[place + 1 :])))
            found += _leads(count, others, unreadable)
    return found


@lru_cache(maxsize=20_000)
def _leads(own: int, others: tuple[int, ...], unreadable: int) -> Floats:
    """[m + 1]: the odds that the answer that ``own`` samples give is the vote's."""
    m = own + sum(others) + unreadable
    found = np.zeros(m + 1)
    for x in range(1, own + 1):
        ways = comb(unreadable, np.arange(unreadable + 1))[None, :]  # [tied, size]
        for count in others:
            ways = _with(ways, count, x)
        total = comb(own, x) * (ways / np.arange(1.0, len(ways) + 1)[:, None]).sum(axis=0)
        found[x : x + len(total)] += total
    chances: Floats = found / comb(m, np.arange(m + 1))
    return chances


def _with(ways: Floats, count: int, x: int) -> Floats:
    """And of another answer's samples fewer than ``x``, or as many."""
    ties, size = ways.shape
    found = np.zeros((ties + (count >= x), size + count))
    for i in range(min(count, x - 1) + 1):
        found[:ties, i : i + size] += comb(count, i) * ways
    if count >= x:
        found[1:, x : x + size] += comb(count, x) * ways
    return found


def _of_question(
    outcome: Outcome, sizes: tuple[int, ...], prior: AnswerPrior, rightness: Rightness
) -> Floats:
    m, counts = len(outcome.answers), outcome.counts()
    said = {
        answer
        for answer, correct in zip(outcome.answers, outcome.correct, strict=True)
        if correct >= 0.5
    }
    known = right_votes(
        tuple(counts.values()), [answer in said for answer in counts], m - counts.total()
    )
    found = known[np.minimum(sizes, m)]
    more = np.maximum(np.array(sizes) - m, 0)
    if not counts or not more.any():
        return found
    # As many of those to come can be read as of those that came.
    readable = more * counts.total() / m
    most = max(int(np.ceil(readable.max())), 1)
    looks = tuple(size for size in vote_sizes(most))
    gained = gains(sorted(counts.values()), prior, rightness, looks)
    grown: Floats = np.minimum(found + np.interp(readable, (0, *looks), (0.0, *gained)), 1.0)
    return grown
