"""Which thresholds a cascade may have, from questions that all of its stages were recorded on.

A question goes from stage to stage until one's score reaches its threshold; the last one answers
whatever comes to it. Thresholds are points of a grid that is fixed beforehand, and tested in an
order that is fixed beforehand, from the safest on, until one fails: all before it keep the risk
with probability 1 - delta (fixed-sequence testing, Learn then Test, arXiv:2110.01052). With more
than two stages there is a sequence for each setting of the later thresholds, and delta is shared
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf

import numpy as np
from numpy.typing import NDArray

from thrifty.scaling.risk_bounds import in_expectation, is_binary, p_value, upper_bound

Floats = NDArray[np.float64]
Thresholds = tuple[float, ...]

NEVER = inf
"""The threshold that no score reaches."""
GRID = (
    NEVER,
    *(1.0, 0.998, 0.995, 0.99, 0.98, 0.97, 0.96),
    *(round(0.95 - 0.05 * i, 2) for i in range(20)),
)
"""Of the first stage, the safest first; finer where mean token probabilities lie."""
COARSE = (NEVER, 1.0, 0.9, 0.7, 0.5, 0.0)
"""Of the stages between the first and the last."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """What each stage said to each question; arrays are [stages, questions]."""

    scores: Floats
    """From 0 to 1; below 0 where no answer could be read, so that it goes on."""
    right: Floats
    """Of the answer that stands when the stage is done, from 0 to 1."""
    costs: tuple[float, ...]
    """Of asking each stage."""

    @property
    def num_questions(self) -> int:
        return self.scores.shape[1]

    def last_asked(self, thresholds: Thresholds) -> NDArray[np.intp]:
        """[questions]: the stage at which each one ends."""
        ends = self.scores[:-1] >= np.array(thresholds)[:, None]
        return np.where(ends.any(axis=0), ends.argmax(axis=0), len(self.costs) - 1)

    def reached(self, thresholds: Thresholds) -> Floats:
        """[stages]: share of the questions that come to each."""
        last = self.last_asked(thresholds)
        return np.array([(last >= stage).mean() for stage in range(len(self.costs))])

    def accuracy(self, thresholds: Thresholds, final: Floats | None = None) -> float:
        """``final``: [questions], what is right where all stages were asked, if not the last."""
        right = self.right if final is None else np.vstack([self.right[:-1], final])
        return float(_at(right, self.last_asked(thresholds)).mean())

    def losses(self, risk: str, thresholds: Thresholds) -> Floats:
        """[questions], from 0 to 1. ``lost``: right answers of the last stage that ending earlier
        loses; ``wrong``: answers; ``calls``: of the last stage; ``cost``: of the stages after the
        first, as a share of asking all of them."""
        last = self.last_asked(thresholds)
        if risk == "lost":
            return np.maximum(self.right[-1] - _at(self.right, last), 0.0)
        if risk == "wrong":
            return 1 - _at(self.right, last)
        if risk == "calls":
            return (last == len(self.costs) - 1).astype(float)
        beyond = np.cumsum((0.0, *self.costs[1:]))
        return beyond[last] / beyond[-1] if beyond[-1] > 0 else np.zeros(len(last))


def _at(values: Floats, stages: NDArray[np.intp]) -> Floats:
    return values[stages, np.arange(values.shape[1])]


def sequences(num_stages: int, risk: str) -> list[list[Thresholds]]:
    """The orders of testing, each from where the risk is least."""
    first = GRID[::-1] if risk in ("calls", "cost") else GRID
    later = product(COARSE, repeat=num_stages - 2)
    return [[(threshold, *others) for threshold in first] for others in later]


def certified(
    recorded: Recorded, risk: str, at_most: float, delta: float, *, in_mean: bool
) -> tuple[list[Thresholds], bool]:
    """Those that keep the mean loss at ``at_most``, with probability 1 - ``delta`` or, ``in_mean``,
    on average over such recordings; and whether all losses were 0 or 1, so that the test was exact.

    What keeps it by construction is among them: nothing is lost where the last stage answers all.
    """
    orders = sequences(len(recorded.costs), risk)
    losses = [[recorded.losses(risk, each) for each in order] for order in orders]
    binary = all(is_binary(loss) for of in losses for loss in of)
    count = recorded.num_questions
    found: list[Thresholds] = []
    for order, of in zip(orders, losses, strict=True):
        means = np.array([loss.mean() for loss in of])
        if in_mean:
            holds = in_expectation(means, count) <= at_most
        else:
            holds = p_value(means, count, at_most, binary=binary) <= delta / len(orders)
        holds |= np.array([_by_construction(risk, at_most, each) for each in order])
        stop = int(np.argmin(holds)) if not holds.all() else len(order)
        found += order[:stop]
    return found, binary


def _by_construction(risk: str, at_most: float, of: Thresholds) -> bool:
    """Whether no question whatever could bring a mean loss above ``at_most``."""
    if risk == "lost" and all(threshold == NEVER for threshold in of):
        return True
    return at_most >= 1


def undominated(
    candidates: Sequence[Thresholds], accuracy: Sequence[float], cost: Sequence[float]
) -> list[int]:
    """Places of those that are more accurate than all that cost no more, the cheapest first."""
    order = sorted(range(len(candidates)), key=lambda i: (cost[i], -accuracy[i]))
    kept: list[int] = []
    for i in order:
        if not kept or accuracy[i] > accuracy[kept[-1]] + 1e-12:
            kept.append(i)
    return kept


@dataclass(frozen=True, kw_only=True)
class Point:
    """Thresholds that may be taken, with what they bring."""

    thresholds: Thresholds
    accuracy: float
    reached: tuple[float, ...]
    """Share of the questions that come to each stage."""
    lost: float
    """Right answers of the last stage, a question."""
    lost_at_most: float
    """With the probability asked for, for all points at once: whichever a price picks."""


def points(
    allowed: Sequence[Thresholds],
    every: Recorded,
    first: Recorded,
    delta: float,
    final: Floats | None = None,
) -> list[Point]:
    """Of ``allowed``, those that are more accurate than all cheaper ones, by ``every``, all that
    was recorded; what they lose by ``first``, one draw of each question, since a bound counts
    independent ones."""
    reached = [every.reached(each) for each in allowed]
    accuracy = [every.accuracy(each, final) for each in allowed]
    cost = [float(np.dot(shares, every.costs)) for shares in reached]
    losses = [first.losses("lost", each) for each in allowed]
    lost = np.array([loss.mean() for loss in losses])
    binary = all(is_binary(loss) for loss in losses)
    most = upper_bound(lost, first.num_questions, delta / len(allowed), binary=binary)
    return [
        Point(
            thresholds=allowed[i],
            accuracy=accuracy[i],
            reached=tuple(map(float, reached[i])),
            lost=float(lost[i]),
            lost_at_most=0.0 if _by_construction("lost", 0.0, allowed[i]) else float(most[i]),
        )
        for i in undominated(allowed, accuracy, cost)
    ]


def rising_shares(scores: Floats, right: Floats) -> list[list[float]]:
    """[score from which on, share that is right], rising (isotonic regression); each step drawn
    towards the mean by one question."""
    from scipy.optimize import isotonic_regression

    order = np.lexsort((-right, scores))  # of equal scores all fall into one step
    rising = isotonic_regression(right[order])
    mean = float(right.mean())
    found: list[list[float]] = []
    for start, end in pairwise(rising.blocks):
        share = (float(rising.x[start]) * (end - start) + mean) / (end - start + 1)
        found.append([float(scores[order[start]]), float(share)])
    for step, following in zip(found[-2::-1], found[:0:-1], strict=True):
        step[1] = min(step[1], following[1])  # rising still
    return found
