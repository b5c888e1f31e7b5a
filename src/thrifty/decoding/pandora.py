"""Pandora: sample until another sample is not expected to beat the best one by what it costs.

For rewards that are numbers (a reward model's). Were the distribution of a question's rewards
known, the best rule would be Weitzman's (1979): stop once the best reward is at the fair cap tau,

    E[(X - tau)+] = c

c the cost of a sample in reward. As the gain falls in tau, this is to stop where
E[(X - best)+] <= c. It is not known, so the cap is an optimistic one (arXiv:2510.01394): of a
normal distribution whose mean is taken ``optimism`` standard errors above what the question's own n
rewards, and past questions, let expect, and whose scale is integrated out,

    X ~ mean + optimism * e + sqrt(s^2 + e^2) t_v
    s^2 = (v_0 s_0^2 + sum (x - mean x)^2) / v,   v = v_0 + n - 1
    1 / e^2 = n / s^2 + 1 / b^2,                  mean = e^2 (n mean x / s^2 + m / b^2)

Every question takes two samples at least, and past questions of the run teach the scale: of their
first two rewards m and b^2, mean and variance of their means, and s_0^2, the variance within one;
of all their rewards v_0, how alike that is among them, by the moments of its logarithm (as Smyth
2004, doi:10.2202/1544-6115.1027). Until enough are known a question has its own alone, three at
least. The paper fits an exponential tail, and measures rewards on a Bradley-Terry scale of each
question; here they are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from statistics import fmean
from typing import ClassVar

import numpy as np
from scipy.special import digamma, polygamma, stdtr

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, best

_LEAST_PAST = 8
"""Questions with two rewards that tell a scale."""
_MOST_PAST = 256
"""That are looked at, evenly among all: more tell little more, and a decision has to be quick."""
_ALIKE = 1000.0
"""v_0 where the variance of all questions is the same."""


@dataclass(frozen=True, kw_only=True)
class Pandora(DecodingPolicy):
    """Sample until another one is not expected to beat the best reward by what it costs."""

    cost_in_reward: float | None = None
    """What a unit of the resource is worth, in reward; none given: the price of the run."""
    optimism: float = 1.0
    """Standard errors by which the mean reward of a question is taken higher than it seems."""
    samples: int = 40
    """At most."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2510.01394; Weitzman 1979"
    needs: ClassVar = "rewards"
    pooled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(
            self, cost_in_reward=(0, math.inf), optimism=(0, math.inf), samples=(1, math.inf)
        )

    def check(self, means: Means) -> None:
        super().check(means)
        if self._price(means) <= 0:
            raise ValueError(
                "pandora weighs the reward of a sample against its cost, and there is no cost\n"
                "hint: policy: {pandora: {cost_in_reward: 0.02}}, what one more of the "
                f"{means.resource} must bring in reward"
            )

    def decide(self, asked: Asked, means: Means) -> Action:
        return self.decide_all([asked], means)[0]

    def decide_all(self, questions: Sequence[Asked], means: Means) -> list[Action]:
        scale = _scale(tuple(means.past))
        return [self._decide(asked, means, scale) for asked in questions]

    def close(self, asked: Asked, means: Means, reason: str) -> Finish:
        return best(asked, reason)

    def _decide(self, asked: Asked, means: Means, scale: Scale | None) -> Action:
        wanted = min(self.samples, means.max_samples)
        drawn = asked.num_drawn
        rewards = rewards_of(asked)
        offer = means.offer(self.model) if self.model else means.offers[0]
        if drawn >= wanted:
            return best(asked, f"{wanted} samples, the most")
        if drawn > 1 and not rewards:
            return best(asked, f"{drawn} samples without a reward")
        if drawn < 2:
            count = min(2 - drawn, wanted - drawn)
            return Draw(model=offer.model, count=count, reason="two rewards tell the scale")
        gain = expected_gain(rewards, scale, self.optimism)
        cost = self._price(means) * offer.cost
        if gain <= cost:
            return best(
                asked, f"another sample would bring {gain:.3g} of reward and cost {cost:.3g}"
            )
        return Draw(
            model=offer.model,
            rate=gain / offer.cost if offer.cost > 0 else math.inf,
            reason=f"another sample may bring {gain:.3g} of reward and costs {cost:.3g}",
        )

    def _price(self, means: Means) -> float:
        return means.price if self.cost_in_reward is None else self.cost_in_reward


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What past questions say of one whose rewards are not known yet."""

    mean: float
    mean_variance: float
    """Of questions' means, b^2."""
    variance: float
    """Within a question, s_0^2."""
    weight: float
    """Of that in rewards, v_0."""


def rewards_of(asked: Asked) -> list[float]:
    """Those that are numbers, and whose squares are."""
    return [
        sample.reward
        for sample in asked.answers()
        if sample.reward is not None and abs(sample.reward) < 1e100
    ]


@lru_cache(maxsize=2)
def _scale(past: tuple[Asked, ...]) -> Scale | None:
    """``scale_of``, for the many decisions between two looks at all questions."""
    return scale_of(past)


def scale_of(past: Sequence[Asked]) -> Scale | None:
    """None where too few questions have two rewards. Means and the variance are of the first two
    rewards, which every question has: who has more of them had low ones at first."""
    stride = max(1, math.ceil(len(past) / _MOST_PAST))
    known = [rewards for asked in past[::stride] if len(rewards := rewards_of(asked)) > 1]
    if len(known) < _LEAST_PAST:
        return None
    first = np.array([rewards[:2] for rewards in known])
    variance = max(float(np.mean((first[:, 0] - first[:, 1]) ** 2)) / 2, 1e-24)
    means = first.mean(axis=1)
    half_freedom = np.array([(len(rewards) - 1) / 2 for rewards in known])
    within = np.maximum([_variance(rewards) for rewards in known], 1e-24)
    logs = np.log(within) - digamma(half_freedom) + np.log(half_freedom)
    noise = polygamma(1, half_freedom)
    trust = noise**-2 / np.sum(noise**-2)
    spread = float(trust @ ((logs - trust @ logs) ** 2 - noise))
    return Scale(
        mean=float(means.mean()),
        mean_variance=max(float(np.var(means, ddof=1)) - variance / 2, 1e-24),
        variance=variance,
        weight=min(2 * _inverse_trigamma(spread), _ALIKE),
    )


def _variance(rewards: Sequence[float]) -> float:
    return _squares(rewards, fmean(rewards)) / (len(rewards) - 1)


def _squares(rewards: Sequence[float], centre: float) -> float:
    """Of what lies between them and ``centre``, summed."""
    apart = [each - centre for each in rewards]
    return sum(map(mul, apart, apart))


def _inverse_trigamma(value: float) -> float:
    """By Newton's method, which converges from this start (Smyth 2004); infinite for 0 or less."""
    if value <= 1e-6:
        return math.inf
    x = 0.5 + 1 / value
    for _ in range(20):
        trigamma = float(polygamma(1, x))
        x += trigamma * (1 - trigamma / value) / float(polygamma(2, x))
    return x


def expected_gain(rewards: Sequence[float], scale: Scale | None, optimism: float) -> float:
    """E[(X - best)+] of one more reward; infinite where too little is known."""
    n, centre = len(rewards), fmean(rewards)
    freedom = n - 1.0
    squares = _squares(rewards, centre)
    if scale is not None:
        freedom += scale.weight
        squares += scale.weight * scale.variance
    if freedom <= 1:
        return math.inf
    variance = max(squares / freedom, 1e-24)
    doubt = variance / n
    if scale is not None:
        doubt = 1 / (n / variance + 1 / scale.mean_variance)
        centre = doubt * (n * centre / variance + scale.mean / scale.mean_variance)
    width = math.sqrt(variance + doubt)
    return width * _above((max(rewards) - centre - optimism * math.sqrt(doubt)) / width, freedom)


def _above(z: float, freedom: float) -> float:
    """E[(t - z)+], t of Student's distribution with more than one degree of freedom."""
    log_density = (
        math.lgamma((freedom + 1) / 2)
        - math.lgamma(freedom / 2)
        - math.log(freedom * math.pi) / 2
        - (freedom + 1) / 2 * math.log1p(z * z / freedom)
    )
    tail = (freedom + z * z) / (freedom - 1) * math.exp(log_density)
    return max(0.0, float(tail - z * stdtr(freedom, -z)))
