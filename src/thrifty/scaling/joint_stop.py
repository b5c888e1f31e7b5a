"""Joint stop: how long to train and how many samples an answer takes, out of one budget.

    max A_K(B)    such that    B + N K f(B) <= C                    (after arXiv:2601.01332)

A_K(B): accuracy of a vote over K samples of the model that B FLOPs of training make; N: questions
that it is to answer; f: FLOPs of a sample; C: the budget. Along the way the same is a price: with D
left for sampling a FLOP of it is worth

    lambda = (V(D / N f) - V((D - c) / N f)) / c,       c what an interval of training takes,

V the vote's accuracy over samples a question of the checkpoint as it is. Training on is past its
best use where what it brings to the vote of as many samples, a FLOP, is less. Samples between two
whole numbers are a mean: some questions get one more. So V is the concave hull of the whole
numbers' accuracies, from no samples and no answers on, and flat behind its highest.

Where accuracy is given and FLOPs are to be saved, an early checkpoint with K samples is cheaper
than a later one with K' up to

    N* = (B' - B) / (K f - K' f')

questions (the paper's break-even), and whatever their number where K f <= K' f'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

GRID = 129
"""Lengths of training that are looked at, from what is spent to the whole budget."""
_HALVINGS = 50


@dataclass(frozen=True)
class VoteCurve:
    """Accuracy over samples a question, of one checkpoint."""

    sizes: tuple[int, ...]
    """In rising order."""
    accuracy: tuple[float, ...]

    def at(self, samples: float) -> float:
        """With so many samples a question on average; few enough, and some are not answered."""
        hull = self._hull
        return float(np.interp(samples, hull[:, 0], hull[:, 1]))

    @property
    def most_useful(self) -> int:
        """Samples beyond which nothing is gained."""
        return int(self._hull[-1, 0])

    @cached_property
    def _hull(self) -> NDArray[np.float64]:
        """[corners, 2], from (0, 0) to the highest."""
        found = [(0.0, 0.0)]
        for point in zip(self.sizes, self.accuracy, strict=True):
            if point[1] <= found[-1][1]:
                continue  # no higher, with more samples
            while len(found) > 1 and _slope(found[-1], point) >= _slope(found[-2], found[-1]):
                found.pop()
            found.append((float(point[0]), float(point[1])))
        return np.array(found)


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def samples_left(left: float, questions: float, flops_a_sample: float, max_samples: float) -> float:
    """That ``left`` FLOPs pay for, a question."""
    if left <= 0:
        return 0.0
    return min(left / (questions * flops_a_sample), max_samples)


def sampling_price(
    curve: VoteCurve,
    *,
    left: float,
    interval: float,
    questions: float,
    flops_a_sample: float,
    max_samples: float,
) -> float:
    """Accuracy that a FLOP brings as samples: what of ``left`` an interval of training would take
    away."""
    now, then = (
        curve.at(samples_left(flops, questions, flops_a_sample, max_samples))
        for flops in (left, left - interval)
    )
    return (now - then) / interval if interval > 0 else 0.0


@dataclass(frozen=True)
class Way:
    """To spend a budget."""

    training_flops: float
    samples: int
    flops_a_sample: float
    accuracy: float
    stderr: float = 0.0

    def flops(self, questions: float) -> float:
        """Of training and answering."""
        return self.training_flops + questions * self.samples * self.flops_a_sample


@dataclass(frozen=True)
class JointChoice:
    """What was chosen and what lost."""

    best: Way
    ways: tuple[Way, ...]
    """The best of each number of samples that can be paid for, in their order."""

    @property
    def longest(self) -> Way:
        """With the fewest samples, and so with most of the budget for training."""
        return self.ways[0]

    def break_even(self) -> float:
        """Questions up to which the best takes less than training longest."""
        return break_even(self.best, self.longest)


def best_way(
    accuracy: Callable[[float, int], tuple[float, float]],
    *,
    budget: float,
    questions: float,
    sizes: Sequence[int],
    flops_a_sample: Callable[[float], float],
    spent: float = 0.0,
) -> JointChoice | None:
    """The most accurate way that the budget pays for, of equals the one that takes less; None where
    not even the fewest samples of what is there already can be paid for.

    ``accuracy``: (training FLOPs, samples) -> accuracy and its standard error.
    """
    lengths = np.linspace(spent, budget, GRID)
    ways = []
    for size in sorted(sizes):
        found = []
        for end in (*lengths, _longest(lengths, budget, questions * size, flops_a_sample)):
            each = flops_a_sample(end)
            if spent <= end and end + questions * size * each <= budget * (1 + 1e-12):
                found.append(Way(float(end), size, each, *accuracy(end, size)))
        if found:
            ways.append(_first(found, questions))
    return JointChoice(_first(ways, questions), tuple(ways)) if ways else None


def _longest(
    lengths: NDArray[np.float64],
    budget: float,
    samples: float,
    flops_a_sample: Callable[[float], float],
) -> float:
    """The longest training beside so many samples: what lies behind the longest of the grid that
    can be paid for, halved again and again."""

    def is_paid(end: float) -> bool:
        return end + samples * flops_a_sample(end) <= budget

    paid = [float(end) for end in lengths if is_paid(end)]
    if not paid:
        return -math.inf
    least, most = paid[-1], budget
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if is_paid(middle) else (least, middle)
    return least


def _first(ways: Sequence[Way], questions: float) -> Way:
    return max(ways, key=lambda way: (way.accuracy, -way.flops(questions)))


def break_even(early: Way, late: Way) -> float:
    """Questions up to which ``early``, with its samples, takes less FLOPs than ``late`` with its
    own: 0 where it does not even for a few, infinite where it does for any number."""
    saved = late.training_flops - early.training_flops
    dearer = early.samples * early.flops_a_sample - late.samples * late.flops_a_sample
    if saved < 0 or (saved == 0 and dearer >= 0):
        return 0.0
    return saved / dearer if dearer > 0 else math.inf
