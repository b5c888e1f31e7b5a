"""Fewer samples than best-of-n for the same reward, and what it does with odd rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Means, Offer, Sample
from thrifty.decoding.pandora import _above, expected_gain, scale_of
from thrifty.drawing import Drawing

MEANS = Means(offers=(Offer(model="m"),))


def asked_with(*rewards: float | None) -> Asked:
    asked = Asked("q")
    for place, reward in enumerate(rewards):
        asked.add(Sample(model="m", answer=str(place), reward=reward))
    return asked


@pytest.mark.parametrize("z", [-3.0, 0.0, 0.7, 4.0])
@pytest.mark.parametrize("freedom", [1.5, 4.0, 1000.0])
def test_the_gain_is_its_integral(z, freedom):
    expected, _ = integrate.quad(lambda t: (t - z) * stats.t.pdf(t, freedom), z, math.inf)
    assert _above(z, freedom) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_scale_of_past_questions_is_found():
    rng = np.random.default_rng(0)
    past = [asked_with(*(rng.normal(3, 2) + 0.5 * rng.normal(size=12))) for _ in range(256)]
    scale = scale_of(past)
    assert scale is not None
    assert scale.mean == pytest.approx(3, abs=0.4)
    assert scale.mean_variance == pytest.approx(4, rel=0.3)
    assert scale.variance == pytest.approx(0.25, rel=0.3)
    assert scale.weight > 30, "all are alike"
    differing = [asked_with(*(rng.exponential(2) * rng.normal(size=12))) for _ in range(64)]
    scale = scale_of(differing)
    assert scale is not None
    assert scale.weight < 5, "each is another"
    assert scale_of(past[:7]) is None


def test_the_gain_falls_with_the_best_and_grows_with_optimism():
    scale = scale_of([asked_with(*(each + k for k in range(4))) for each in range(8)])
    gains = [expected_gain([0.0, 1.0, best], scale, 1.0) for best in (2.0, 3.0, 5.0)]
    assert gains[0] > 0
    assert expected_gain([0.0, 1.0, 2.0], scale, 0.0) < gains[0]
    assert expected_gain([0.0, 1.0], None, 1.0) == math.inf
    assert expected_gain([0.0, 1.0, 1.1, 1.2], None, 1.0) < math.inf


def test_it_stops_where_another_is_not_worth_its_cost():
    asked = asked_with(0.0, 0.1, -0.1, 0.2, 2.0)
    cheap = resolve("policy", {"pandora": {"cost_in_reward": 1e-6}}).decide(asked, MEANS)
    assert isinstance(cheap, Draw)
    assert cheap.count == 1
    assert 0 < cheap.rate < math.inf
    dear = resolve("policy", {"pandora": {"cost_in_reward": 1.0}}).decide(asked, MEANS)
    assert isinstance(dear, Finish)
    assert dear.answer == "4"
    assert "reward 2" in dear.reason


@pytest.mark.parametrize(
    "rewards",
    [
        [1.0] * 50,
        [None] * 50,
        [math.nan] * 50,
        [math.inf, -math.inf] * 25,
        [1e308, -1e308] * 25,
        [0.0, None] * 25,
        [1e-320, 0.0] * 25,
    ],
)
def test_odd_rewards_end_within_the_limit(rewards):
    policy = resolve("policy", {"pandora": {"cost_in_reward": 0.01}})
    asked, past = Asked("q"), [asked_with(*rewards[:5]) for _ in range(6)]
    for known in ([], past):
        asked = Asked("q")
        means = Means(offers=(Offer(model="m"),), past=known)
        while isinstance(action := policy.decide(asked, means), Draw):
            for _ in range(action.count):
                number = len(asked.samples)
                asked.add(Sample(model="m", answer="a", reward=rewards[number]))
            assert len(asked.samples) <= means.max_samples
        assert action.reason


@pytest.mark.parametrize("noise", ["normal", "gumbel", "exponential"])
def test_it_takes_fewer_samples_than_best_of_n_for_the_same_reward(noise, capsys):
    rng = np.random.default_rng(5)
    made = {"normal": rng.normal, "gumbel": rng.gumbel, "exponential": rng.exponential}[noise]
    rewards = rng.normal(size=(300, 1)) + made(size=(300, 40))
    best_of = np.maximum.accumulate(rewards, axis=1).mean(axis=0)
    policy = resolve("policy", {"pandora": {"cost_in_reward": 0.05 * float(rewards.std(1).mean())}})
    questions = [Asked(str(place)) for place in range(300)]
    drawing = Drawing(policy, questions, Means(offers=(Offer(model="m"),), num_open=300))
    while batch := drawing.next(16):
        for asked, draw in batch:
            row, start = rewards[int(asked.id)], len(asked.samples)
            samples = [
                Sample(model="m", answer=str(reward), reward=float(reward))
                for reward in row[start : start + draw.count]
            ]
            drawing.came_back(asked, samples, len(samples))
    drawn = np.array([len(asked.samples) for asked in questions])
    reward = float(np.mean([rewards[i, :n].max() for i, n in enumerate(drawn)]))
    needed = float(np.interp(reward, best_of, np.arange(1, 41)))
    saved = 1 - drawn.mean() / needed
    with capsys.disabled():
        print(f"\n{noise}: {drawn.mean():.1f} samples, best-of-n {needed:.1f}: {saved:.0%} saved")
    assert saved > 0.10
