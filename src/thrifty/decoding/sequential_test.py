"""Sequential test: sample until every other answer is refuted as the model's most likely one.

What is promised: that a question is called settled and its answer is not one that endless samples
would vote for happens with probability ``error`` at most, whenever it stops and however many
answers there are, those never seen included.

For each answer i, seen or not, somebody bets against "i is a most likely answer". Before each
sample the leader l so far (n_l times given) and i (n_i times) are known; the bet is on l, should
the sample be l or i:

    wealth_i *= 2 q        where it is l
    wealth_i *= 2 (1 - q)  where it is i
    wealth_i *= 1          where it is neither, or where i itself leads

    q = E[theta | theta >= 1/2],  theta ~ Beta(n_l + 1/2, n_i + 1/2)

If i is a most likely answer, then p_l <= p_i whichever l leads, so that the factor's expectation
is at most 1, since 2 q >= 1: wealth_i is a non-negative supermartingale that begins at 1, and by
Ville's inequality P(wealth_i ever reaches 1 / error) <= error. The rule stops where all but the
leader were refuted, each at whatever time its wealth reached 1 / error. To settle on a wrong answer
it must have refuted i*, a most likely one: one event of probability ``error`` at most, no union
over the answers. One account stands for all answers that were never seen, whose n_i is 0; a new one
takes it over. This holds for independent samples; texts without a readable answer are left out, so
that the vote is that of the readable ones.

Betting as in arXiv:2010.09686; that the pairs of answers suffice, and the prior-posterior-ratio
martingales for them, arXiv:2109.05047 and 2006.04347. Here who bets on whom is decided as samples
come, which saves those papers' division of ``error`` by the number of answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from scipy.special import betaincc

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, vote


@dataclass(frozen=True, kw_only=True)
class SequentialTest(DecodingPolicy):
    """Sample until the vote cannot be wrong, but with a given probability."""

    error: float = 0.05
    """That the answer of a settled question is not what endless samples would vote for."""
    samples: int = 40
    """At most."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2010.09686; arXiv:2109.05047"

    def __post_init__(self) -> None:
        check_ranges(self, error=(1e-12, 0.5), samples=(1, math.inf))

    def decide(self, asked: Asked, means: Means) -> Action:
        places = {answer: place for place, answer in enumerate(asked.counts)}
        given = tuple(
            places[sample.answer] for sample in asked.answers() if sample.answer is not None
        )
        wanted = min(self.samples, means.max_samples)
        left = wanted - asked.num_drawn
        missing = _missing(given, self.error)
        if missing == 0:
            return vote(asked, f"any other answer is refuted, at an error of {self.error:g}")
        if left <= 0:
            return vote(asked, f"{wanted} samples, unsettled")
        return Draw(model=self.model or means.offers[0].model, count=int(min(missing, left)))


@lru_cache(maxsize=1 << 14)
def _missing(given: Sequence[int], error: float) -> float:
    """Further samples without which it cannot be settled. ``given``: answers in the order in which
    they came, numbered by their first appearance."""
    bets = Bets(-math.log(error))
    for answer in given:
        bets.add(answer)
    return bets.missing


class Bets:
    """The wealth, in logarithms, of those who bet against each answer, and who was refuted.

    Answers are numbered by their first appearance, from 0; the last account is that of all answers
    that were not seen so far."""

    def __init__(self, enough: float) -> None:
        self.enough = enough
        self.counts = [0]
        self.wealth = [0.0]
        self.refuted = [False]
        self.leader = 0
        """The first answer, until another one was given more often."""

    def add(self, answer: int) -> None:
        if answer == len(self.counts) - 1:  # it takes the account over
            self.counts.append(0)
            self.wealth.append(self.wealth[answer])
            self.refuted.append(self.refuted[answer])
        leads = self.counts[self.leader]
        if answer != self.leader:
            self._pay(answer, _stakes(leads, self.counts[answer])[1])
        elif leads:
            for other, count in enumerate(self.counts):
                if other != answer and not self.refuted[other]:
                    self._pay(other, _stakes(leads, count)[0])
        self.counts[answer] += 1
        if self.counts[answer] > self.counts[self.leader]:
            self.leader = answer

    @property
    def missing(self) -> float:
        """Samples without which not all but one are refuted: no wealth can more than double with
        one. Infinite where those that came contradict each other."""
        *seen, unseen = (
            0.0 if refuted else max(1.0, math.ceil((self.enough - wealth) / math.log(2)))
            for wealth, refuted in zip(self.wealth, self.refuted, strict=True)
        )
        if unseen == 0 and not any(seen):
            return math.inf
        return max(unseen, *sorted(seen)[:-1], 0.0)

    def _pay(self, against: int, gain: float) -> None:
        wealth = self.wealth[against] = self.wealth[against] + gain
        if wealth >= self.enough:
            self.refuted[against] = True


@lru_cache(maxsize=1 << 16)
def _stakes(leads: int, count: int) -> tuple[float, float]:
    """log(2 q) and log(2 (1 - q))."""
    a, b = leads + 0.5, count + 0.5
    q = a / (a + b) * float(betaincc(a + 1, b, 0.5) / betaincc(a, b, 0.5))
    return math.log(2 * q), math.log(2 * (1 - q))
