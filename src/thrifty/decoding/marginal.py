"""Marginal: a sample is drawn where it makes a vote likelier right, as long as that is worth it.

    rate = max_k  E[P(the vote is right after k more) - P(it is right now)] / (k cost of a sample)

with the gain of ``scaling/vote_gain.py``: an answer that was never seen is allowed for, how answers
spread is learnt from the run's other questions, and how often a vote is right from questions with
gold answers, where there are any. Looking k ahead matters: from 3 to 1 no single sample flips a
vote. One is drawn at a time, and the rate is found anew. Where a pool shares one budget the highest
rates come first, so that all questions end at one rate, the price of what the budget could not buy
(arXiv:2604.14853 prices questions so by bisection, arXiv:2410.04707 by a learnt predictor). The
gain is an expectation: among many small draws luck evens out, and no error bar is taken off it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from thrifty.core import marginal
from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, Outcome, vote
from thrifty.scaling.answer_prior import AnswerPrior, fit_prior, flat_prior, prior_from
from thrifty.scaling.rightness import fit_rightness
from thrifty.scaling.vote_gain import Rightness, gains, unseen_odds

_LOOKS = (1, 2, 4, 8, 16)
"""How far ahead it looks, samples; to the last that there can be where that is nearer. What takes
more to flip a vote brings less a sample."""


@dataclass(frozen=True, kw_only=True)
class Marginal(DecodingPolicy):
    """Draw where a vote can still become right, as long as that is worth its price."""

    price: float | None = None
    """Right answers that a unit of the resource must bring; none: as the run says."""
    samples_worth: float = 2000.0
    """Samples that a right answer is worth where neither a price nor a budget says so."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""
    at_once: float = 0.0
    """Share of the samples that it looks ahead which is drawn before it looks again: fewer waits
    for an endpoint, for some more samples. At least one."""

    source: ClassVar[str] = "arXiv:2606.10706, arXiv:2410.04707"
    pooled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, price=(0.0, math.inf), samples_worth=(1.0, math.inf), at_once=(0.0, 1.0))

    def fit(self, outcomes: Sequence[Outcome], means: Means) -> dict[str, Any]:
        """How answers spread, and how often a vote is right: of the model that is asked."""
        model = self.model or means.offers[0].model
        mine = [outcome for outcome in outcomes if outcome.model == model]
        return {**fit_rightness(mine), "spread": fit_prior(o.tally() for o in mine).to_list()}

    def decide(self, asked: Asked, means: Means) -> Action:
        (action,) = self.decide_all([asked], means)
        return action

    def decide_all(self, questions: Sequence[Asked], means: Means) -> list[Action]:
        prior, rightness = _beliefs(means)
        return [self._decide(asked, means, prior, rightness) for asked in questions]

    def _decide(
        self, asked: Asked, means: Means, prior: AnswerPrior, rightness: Rightness
    ) -> Action:
        more = means.max_samples - asked.num_drawn
        model = self.model or means.offers[0].model
        counts = tuple(sorted(asked.counts.values(), reverse=True))
        if more < 1:
            return self._finish(asked, f"{means.max_samples} samples, the most", prior, rightness)
        if counts:
            gain, ahead = _best(counts, more, prior, rightness)
        else:  # the first that can be read brings as much as a first answer is right
            gain, ahead = _first(prior, rightness), 1
        readable = (asked.num_readable + 1) / (asked.num_drawn + 1)
        cost = means.offer(model).cost
        rate = marginal.rate(gain * readable, ahead * cost)
        if rate > self._price(means, cost):
            return Draw(model=model, count=max(1, round(ahead * self.at_once)), rate=rate)
        return self._finish(
            asked, f"{ahead} more would bring {gain:.2g}, not worth it", prior, rightness
        )

    def _price(self, means: Means, cost: float) -> float:
        """What a budget leaves over has no other use, unless more questions come."""
        if self.price is not None:
            return self.price
        if means.price or (math.isfinite(means.left) and not means.more_to_come):
            return means.price
        return 1 / (self.samples_worth * cost) if cost > 0 else 0.0

    def close(self, asked: Asked, means: Means, reason: str) -> Finish:
        return self._finish(asked, reason, *_beliefs(means))

    def _finish(
        self, asked: Asked, reason: str, prior: AnswerPrior, rightness: Rightness
    ) -> Finish:
        counts = list(asked.counts.values())
        if not counts:
            return vote(asked, reason)
        unseen = unseen_odds(counts, prior.posterior(counts))
        chances = rightness.of(counts, unseen)
        chance = float(chances[counts.index(max(counts))])
        hopeless = chance < 0.5
        if hopeless:
            reason = f"given up, no answer is likely: {reason}"
        return Finish(answer=asked.leader(), confidence=chance, reason=reason, given_up=hopeless)


def _beliefs(means: Means) -> tuple[AnswerPrior, Rightness]:
    """How answers spread, and how often a vote is right."""
    learnt = means.learnt
    prior = _prior(tuple(means.past), tuple(learnt.get("spread", ())))
    return prior, Rightness(learnt.get("sharpness", 1.0), learnt.get("none"))


@lru_cache(maxsize=16)
def _prior(past: tuple[Asked, ...], spread: tuple[float, ...]) -> AnswerPrior:
    """Fitted to the run's questions; begun from what was learnt elsewhere."""
    start = prior_from(spread) if spread else flat_prior()
    return fit_prior((tuple(asked.counts.values()) for asked in past), start=start)


@lru_cache(maxsize=200_000)
def _best(
    counts: tuple[int, ...], more: int, prior: AnswerPrior, rightness: Rightness
) -> tuple[float, int]:
    """The gain, and how far ahead, of the highest rate within ``more`` samples."""
    looks = tuple(k for k in _LOOKS if k < more) + ((more,) if more <= _LOOKS[-1] else ())
    found = gains(counts, prior, rightness, looks)
    best = max(range(len(looks)), key=lambda i: found[i] / looks[i])
    return float(found[best]), looks[best]


@lru_cache(maxsize=16)
def _first(prior: AnswerPrior, rightness: Rightness) -> float:
    return float(rightness.of((1,), unseen_odds((1,), prior.posterior((1,))))[0])
