"""Forecasts of a run's end: the law beside naive versions of its formulas, and what it must do."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation, Outlook
from thrifty.core.marginal import replay
from thrifty.core.resolve import resolve
from thrifty.scaling import posterior
from thrifty.scaling.annealing import CoolDown, annealed
from thrifty.scaling.curves import forecast, foresee
from thrifty.scaling.endings import endings
from thrifty.scaling.learning_rate import WarmupStable
from thrifty.scaling.posterior import Posterior, condition
from thrifty.schedule import WarmupStableDecay

PRIOR = CoolDown(gain=0.05, gain_stderr=0.01, rates=(3.0,), beta=2.0, gamma=0.6, drift=(0.01,))


def naive_annealed(shares, step, rate, beta, gamma):
    """LD / B of arXiv:2503.12811, a loop a sum."""
    peak, total = int(np.argmax(shares)), 0.0
    for k in range(peak + 1, step):
        since = sum(shares[k + 1 : step]) + shares[k]
        x = rate * since / sum(shares[:k]) * max(shares[k], 1e-3) ** -gamma
        total += (shares[k - 1] - shares[k]) * (1 - (x + 1) ** -beta)
    return total


def evaluations(losses, stderr=0.002, every=10, start=0):
    return [
        Evaluation(step=start + every * i, flops=1e12 * i, loss=float(loss), stderr=stderr)
        for i, loss in enumerate(losses)
    ]


def outlook(**changes):
    return Outlook(
        **{
            "resource": "flops",
            "next_interval": Cost(flops=1e12),
            "remaining": Cost(flops=1e13),
            "price": 0.0,
            "unit": "nats/token",
            "schedule": WarmupStable(5, 30),
            "interval_steps": 10,
            **changes,
        }
    )


def law(shares, steps, *, floor=2.0, excess=0.6, alpha=0.5, brings=0.1):
    summed = np.concatenate([[0.0], np.cumsum(shares)])[steps]
    power = excess * ((summed + 10) / 100) ** -alpha
    return floor + power - brings * annealed(shares, np.asarray(steps), PRIOR, 3.0)


# -- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares",
    [
        WarmupStable(10, 30).shares(60),
        np.concatenate([np.ones(20), np.linspace(1, 0, 40)]),
        np.concatenate([np.ones(20), np.full(30, 0.2)]),
        0.5 * (1 + np.cos(np.pi * np.arange(50) / 50)),
    ],
    ids=["1 - sqrt", "linear", "step", "cosine"],
)
def test_annealing_is_the_paper_s_double_sum(shares):
    steps = np.array([1, 15, 30, len(shares)])
    found = annealed(shares, steps, PRIOR, 3.0)
    naive = [naive_annealed(shares, step, 3.0, PRIOR.beta, PRIOR.gamma) for step in steps]
    np.testing.assert_allclose(found, naive, rtol=1e-12, atol=1e-15)


def test_many_drops_taken_together_are_nearly_those_alone(monkeypatch):
    shares = np.concatenate([np.ones(500), np.linspace(1, 0, 3000)])
    steps = np.array([1500, 3500])
    together = annealed(shares, steps, PRIOR, 3.0)
    monkeypatch.setattr("thrifty.scaling.annealing.MOST_DROPS", 10_000)
    np.testing.assert_allclose(together, annealed(shares, steps, PRIOR, 3.0), rtol=5e-3)


def test_a_cooldown_only_ever_brings_more():
    shares = np.concatenate([WarmupStable(10, 40).shares(60), np.zeros(100)])
    brought = annealed(shares, np.arange(1, 200), PRIOR, 3.0)
    assert (np.diff(brought) >= -1e-15).all()
    assert brought[59] == 0.0, "nothing before it begins"
    assert 0 < brought[-1] <= 1
    by_length = [
        annealed(WarmupStable(0, n).shares(60), np.array([60 + n]), PRIOR, 3.0)[0]
        for n in (5, 20, 80)
    ]
    assert by_length == sorted(by_length)


@pytest.mark.parametrize("start", [40, 80])
def test_the_schedule_in_training_is_the_one_that_is_forecast(start):
    trained = WarmupStableDecay(max_steps=100, warmup_steps=7, cooldown_steps=20)
    trained.cool_down_from(start)
    assert [trained(k) for k in range(trained.end)] == trained.shape.shares(start).tolist()
    naive = [
        min(1, (k + 1) / 7) * (1 if k < start else 1 - math.sqrt(min(1, (k - start + 1) / 21)))
        for k in range(trained.end)
    ]
    np.testing.assert_allclose(trained.shape.shares(start), naive, rtol=1e-14)


def test_a_cell_of_the_grid_is_plain_gaussian_conditioning(monkeypatch):
    """One exponent, offset, wandering, noise and shape, with loops and an inverse."""
    for name, value in (("ALPHAS", 0.5), ("WANDERINGS", 0.03), ("NOISES", 1.2e-3)):
        monkeypatch.setattr(posterior, name, np.array([value]))
    monkeypatch.setattr(posterior, "OFFSETS", (0.4,))
    course = WarmupStable(0, 40).shares(70)
    steps = np.array([10, 30, 50, 70, 85])
    losses = law(course, steps) + np.array([0.002, -0.001, 0.0, 0.001, -0.002])
    errors = np.full(5, 0.003)
    found = condition(steps, losses, errors, [course, course[:100]], PRIOR)

    summed = np.array([course[:s].sum() for s in (*steps, 110, 100)])
    place = np.log(summed + 0.4 * summed[0])
    brought = [naive_annealed(course, s, 3.0, 2.0, 0.6) for s in (*steps, 110, 100)]
    level = abs(losses[-1])
    power = np.exp(-0.5 * (place - place[4]))
    mean = losses[-1] + 0.15 * level * (power - 1) - 0.05 * level * np.array(brought)
    recent = place[:5] >= place[0] + 0.3 * (place[4] - place[0])
    slope = np.ptp(losses[recent]) / np.ptp(place[:5][recent])

    def walk(a, b):
        near, apart = max(min(a, b), 0.0), abs(a - b)
        return near**3 / 3 + near**2 * apart / 2

    size = len(place)
    grown = [0.0] * 5 + [math.log(s / summed[4]) for s in summed[5:]]
    covariance = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            covariance[i, j] = level**2 * (1 + 0.09 * power[i] * power[j])
            covariance[i, j] += (0.01 * level) ** 2 * brought[i] * brought[j]
            covariance[i, j] += (0.01 * level) ** 2 * walk(brought[i], brought[j])
            covariance[i, j] += (0.02 * level) ** 2 * brought[i] * grown[i] * brought[j] * grown[j]
            covariance[i, j] += (0.03 * slope) ** 2 * walk(place[i] - place[0], place[j] - place[0])
    noise = np.eye(5) * ((1.2e-3 * level) ** 2 + 0.003**2 / 2)
    gain = covariance[5:, :5] @ np.linalg.inv(covariance[:5, :5] + noise)
    np.testing.assert_allclose(found.means[0], mean[5:] + gain @ (losses - mean[:5]), rtol=1e-7)
    left = covariance[5:, 5:] - gain @ covariance[:5, 5:]
    np.testing.assert_allclose(found.covariances[0], left, rtol=1e-4, atol=1e-8)


def test_gains_and_odds_are_those_of_the_mixture():
    mixture = Posterior(
        weights=np.array([0.25, 0.75]),
        means=np.array([[2.0, 1.0], [2.0, 1.8]]),
        covariances=np.array([np.diag([0.04, 0.09]), np.array([[0.04, 0.03], [0.03, 0.04]])]),
        noise=0.0,
    )
    random = np.random.default_rng(0)
    which = random.random(200_000) < 0.25
    draws = np.where(
        which[:, None],
        random.multivariate_normal(mixture.means[0], mixture.covariances[0], 200_000),
        random.multivariate_normal(mixture.means[1], mixture.covariances[1], 200_000),
    )
    gains = draws[:, 0] - draws[:, 1]
    mean, stderr = mixture.gain(0, 1)
    assert mean == pytest.approx(gains.mean(), abs=0.005)
    assert stderr == pytest.approx(gains.std(), rel=0.01)
    assert mixture.odds(0, 1, 0.3) == pytest.approx((gains > 0.3).mean(), abs=0.005)
    assert mixture.loss(1)[0] == pytest.approx(draws[:, 1].mean(), abs=0.005)


# -- what a forecast must do ----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_at_a_constant_rate_it_is_a_power_law(alpha, monkeypatch):
    course = np.ones(400)
    past = evaluations(law(course, np.arange(20, 220, 20), alpha=alpha), every=20, start=20)
    truth = law(course, [400], alpha=alpha)[0]
    mean, stderr = forecast(past, past[-1].flops + 10e12, course)
    assert abs(mean - truth) < min(2 * stderr, 0.006 * truth)
    other = CoolDown(gain=0.5, gain_stderr=0.4)
    again = forecast(past, past[-1].flops + 10e12, course, other)
    np.testing.assert_allclose(again, (mean, stderr), err_msg="the rate never falls")

    for name, value in (("ALPHAS", alpha), ("WANDERINGS", 1e-6), ("NOISES", 1e-6)):
        monkeypatch.setattr(posterior, name, np.array([value]))
    monkeypatch.setattr(posterior, "OFFSETS", (0.25,))
    exact = [replace(e, stderr=0.0) for e in past]
    mean, _ = forecast(exact, past[-1].flops + 10e12, course)
    assert mean == pytest.approx(truth, rel=1e-5), "that law itself, where it is the only one"


def test_the_cooldown_s_gain_is_foreseen_before_it_begins():
    prior = replace(PRIOR, gain=0.13, gain_stderr=0.02)
    course = WarmupStable(0, 60).shares(240)
    past = evaluations(law(course, np.arange(20, 260, 20), brings=0.3), every=20, start=20)
    truth = law(course, [300], brings=0.3)[0]
    mean, stderr = foresee(past, [course], prior).loss(0)
    blind, _ = foresee(past, [np.ones(300)], prior).loss(0)
    assert abs(mean - truth) < 2 * stderr
    assert abs(mean - truth) < 0.2 * abs(blind - truth)


def test_within_a_cooldown_the_run_s_own_losses_outweigh_the_prior():
    course = WarmupStable(0, 100).shares(200)
    past = evaluations(law(course, np.arange(20, 280, 20), brings=0.3), every=20, start=20)
    truth = law(course, [300], brings=0.3)[0]
    mean, stderr = foresee(past, [course]).loss(0)
    before, _ = foresee(past[:10], [course]).loss(0)
    assert abs(mean - truth) < 2 * stderr
    assert abs(mean - truth) < 0.3 * abs(before - truth)


def test_two_ends_differ_by_less_than_either_is_unsure():
    course = WarmupStable(5, 30).shares(120)
    past = evaluations(law(course, np.arange(0, 130, 10)), every=10)
    seen = endings(past, outlook())
    assert seen.gain > 0
    assert seen.gain_stderr < seen.final_stderr / 3
    assert seen.final < past[-1].loss, "a cool-down brings something"


def test_the_odds_fall_as_the_price_rises():
    past = evaluations(law(np.ones(200), np.arange(0, 130, 10)))
    odds = [endings(past, outlook(price=price)).wrong for price in (0.0, 5e-15, 1e-14, 1e-12)]
    assert odds == sorted(odds, reverse=True)
    assert odds[0] > 0.99
    assert odds[-1] < 0.01


def test_what_remains_is_looked_at_whole():
    """The odds are of the best that a longer run could do, the gain is of one interval."""
    past = evaluations([3.0, 2.8, 2.7, 2.64, 2.6, 2.595, 2.61], stderr=0.02)
    at = outlook(remaining=Cost(flops=5.5e12), price=1e-15)
    near, far = endings(past, replace(at, intervals_left=1)), endings(past, at)
    assert (near.gain, near.final) == pytest.approx((far.gain, far.final))
    courses = [at.schedule.shares(60 + 10 * k) for k in (0, 1, 2, 4, 5)]
    seen = foresee(past, courses)
    odds = [seen.odds(0, i, 1e-3 * k) for i, k in enumerate((1, 2, 4, 5), 1)]
    assert near.wrong == pytest.approx(odds[0])
    assert far.wrong == pytest.approx(max(odds))


def test_same_history_same_verdict_as_after_a_resume():
    past = evaluations(law(np.ones(200), np.arange(0, 130, 10)))
    rule, at = resolve("stopping", "marginal_gain"), outlook(price=3e-15)
    verdict = rule.decide(past, at)
    again = rule.decide([Evaluation(**json.loads(json.dumps(asdict(e)))) for e in past], at)
    assert again == verdict
    assert replay(json.loads(json.dumps(verdict.choice.to_dict()))) == verdict.choice


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_does_not_matter_in_which_unit_the_objective_is(scale):
    past = evaluations(law(np.ones(200), np.arange(0, 130, 10)))
    scaled = [replace(e, loss=e.loss * scale, stderr=e.stderr * scale) for e in past]
    seen, other = endings(past, outlook()), endings(scaled, outlook())
    assert other.final == pytest.approx(seen.final * scale, rel=1e-6)
    assert other.gain_stderr == pytest.approx(seen.gain_stderr * scale, rel=1e-4)


@pytest.mark.parametrize(
    "losses", [[], [2.0], [math.nan, math.nan, 2.0], [2.0, math.nan], [math.inf, 2.0]]
)
def test_nothing_is_foreseen_from_too_little(losses):
    assert endings(evaluations(losses), outlook()) is None


def test_few_or_odd_points_still_give_finite_numbers():
    for losses in ([2.0, 2.0], [0.0, 0.0, 0.0], [2.0, 1e6, 2.0], [1.0, math.nan, 0.9]):
        seen = endings(evaluations(losses, stderr=math.inf), outlook())
        assert all(math.isfinite(value) for value in asdict(seen).values())
    seen = endings(evaluations([2.0, 1.9, 1.8], every=0), outlook())
    assert math.isfinite(seen.final)
