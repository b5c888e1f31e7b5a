"""What every stopping rule must fulfil, and what each of them is for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation, Outlook
from thrifty.core.resolve import all_names, resolve

RULES = all_names("stopping")


def history(losses, stderr=0.002):
    return [
        Evaluation(step=10 * i, flops=1e12 * i, loss=loss, stderr=stderr)
        for i, loss in enumerate(losses)
    ]


def outlook(price=0.0):
    return Outlook(
        resource="flops",
        next_interval=Cost(flops=1e12, seconds=10),
        remaining=Cost(flops=1e13, seconds=100),
        price=price,
        unit="nats/token",
    )


FALLING = [3 - 0.3 * math.log1p(i) for i in range(12)]


@pytest.mark.parametrize("name", RULES)
def test_pure(name):
    rule = resolve("stopping", name)
    for n in range(1, len(FALLING) + 1):
        past = history(FALLING[:n])
        assert rule.decide(past, outlook()) == rule.decide(past, outlook())
        assert past == history(FALLING[:n])


@pytest.mark.parametrize("name", RULES)
def test_a_falling_loss_goes_on(name):
    rule = resolve("stopping", name)
    for n in range(1, len(FALLING) + 1):
        verdict = rule.decide(history(FALLING[:n]), outlook())
        assert not verdict.stop, verdict.reason


@pytest.mark.parametrize("name", RULES)
def test_a_rising_loss_stops(name):
    rising = [*FALLING[:6], *(FALLING[5] + 0.05 * i for i in range(1, 6))]
    verdict = resolve("stopping", name).decide(history(rising), outlook())
    assert verdict.stop
    assert verdict.reason


@pytest.mark.parametrize("name", RULES)
def test_one_up_tick_within_noise_does_not_stop(name):
    noisy = [*FALLING[:6], FALLING[5] + 0.004]
    assert not resolve("stopping", name).decide(history(noisy, 0.01), outlook()).stop


def test_marginal_gain_obeys_the_price():
    rule = resolve("stopping", "marginal_gain")
    past = history(FALLING)
    rate = 0.3 * (math.log1p(12) - math.log1p(11)) / 1e12
    assert not rule.decide(past, outlook(price=rate * 0.7)).stop
    dear = rule.decide(past, outlook(price=rate * 1.5))
    assert dear.stop
    assert dear.choice.price == rate * 1.5
    assert dear.choice.options[0].gain.mean == pytest.approx(rate * 1e12, rel=0.1)


def test_marginal_gain_forecasts_what_comes():
    verdict = resolve("stopping", "marginal_gain").decide(history(FALLING), outlook())
    assert verdict.forecast.loss == pytest.approx(3 - 0.3 * math.log1p(12), abs=0.02)


def test_plateau_counts_evaluations_without_improvement():
    rule = resolve("stopping", {"plateau": {"patience": 2}})
    assert not rule.decide(history([3.0, 2.0, 2.0]), outlook()).stop
    assert rule.decide(history([3.0, 2.0, 2.0, 2.0]), outlook()).stop


def test_gains_are_in_the_unit_of_the_objective():
    rule = resolve("stopping", "marginal_gain")
    verdict = rule.decide(history(FALLING), replace(outlook(), unit="points"))
    assert verdict.choice.options[0].gain.unit == "points"
