"""What every stopping rule must fulfil, and what each of them is for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation, Outlook
from thrifty.core.resolve import all_names, resolve

RULES = all_names("stopping")
WATCHING = [name for name in RULES if name != "budget_share"]
"""Those that look at the losses."""


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


@pytest.mark.parametrize("name", WATCHING)
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


@pytest.mark.parametrize("name", RULES)
def test_every_verdict_says_what_it_rests_on(name):
    verdict = resolve("stopping", name).decide(history(FALLING), outlook())
    assert verdict.forecast.loss == pytest.approx(3 - 0.3 * math.log1p(12), abs=0.02)
    assert verdict.forecast.wrong > 0.95, "the loss falls, and what remains has no other use"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stderr", [math.inf, math.nan, 0.0])
def test_a_dev_set_of_one_row_is_judged_by_its_scatter(name, stderr):
    rule = resolve("stopping", name)
    for n in range(1, len(FALLING) + 1):
        verdict = rule.decide(history(FALLING[:n], stderr), outlook())
        assert not verdict.stop, verdict.reason


@pytest.mark.parametrize("name", RULES)
def test_an_evaluation_without_a_loss_is_no_evidence(name):
    rule = resolve("stopping", name)
    holes = [math.nan if i in (3, 7) else loss for i, loss in enumerate(FALLING)]
    for n in range(1, len(holes) + 1):
        assert not rule.decide(history(holes[:n]), outlook()).stop
    nothing = rule.decide(history([math.nan] * 6), outlook())
    assert not nothing.stop
    assert nothing.forecast is None


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.long
def test_noise_on_a_falling_loss_rarely_stops_it(name):
    rule, stops, noise = resolve("stopping", name), 0, 0.01
    for seed in range(20):
        random = np.random.default_rng(seed)
        losses = [3 - 0.1 * math.log1p(i) + noise * random.standard_normal() for i in range(12)]
        past = history(losses, noise * 2**0.5)
        stops += any(rule.decide(past[:n], outlook()).stop for n in range(4, 13))
    assert stops <= (1 if name == "marginal_gain" else 10)


def test_plateau_counts_evaluations_without_improvement():
    rule = resolve("stopping", {"plateau": {"patience": 2}})
    assert not rule.decide(history([3.0, 2.0, 2.0]), outlook()).stop
    assert rule.decide(history([3.0, 2.0, 2.0, 2.0]), outlook()).stop


def test_budget_share_looks_at_what_is_spent():
    rule = resolve("stopping", {"budget_share": {"share": 0.6}})
    spent = [replace(outlook(), spent=Cost(flops=f)) for f in (1.4e13, 1.6e13)]
    assert [rule.decide(history(FALLING), at).stop for at in spent] == [False, True]
    dear = replace(outlook(), spent=Cost(dollars=9.0), remaining=Cost(dollars=1.0))
    of_dollars = resolve("stopping", {"budget_share": {"resource": "dollars"}})
    assert of_dollars.decide(history(FALLING), dear).stop
    no_limit = replace(dear, remaining=Cost(dollars=math.inf))
    assert "no limit of dollars" in of_dollars.decide(history(FALLING), no_limit).reason
    with pytest.raises(ValueError, match="no share of 'dollar'; one of flops"):
        resolve("stopping", {"budget_share": {"resource": "dollar"}})


def test_gains_are_in_the_unit_of_the_objective():
    rule = resolve("stopping", "marginal_gain")
    verdict = rule.decide(history(FALLING), replace(outlook(), unit="points"))
    assert verdict.choice.options[0].gain.unit == "points"
