"""The best use of compute beside closed forms and brute force, and the price of a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.scaling import allocation
from thrifty.scaling.allocation import Conditions, best_for_flops, least_for_loss, own_slope, price
from thrifty.scaling.laws import Law
from thrifty.scaling.published import PUBLISHED

LAWS = {name: each.law for name, each in PUBLISHED.items()}
CHINCHILLA = LAWS["besiroglu"]
budgets = st.floats(min_value=1e17, max_value=1e26)
PLENTY = Conditions(unique=1e30)
"""As good as no limit, but found by search."""


@given(budgets, st.sampled_from(sorted(LAWS)))
def test_search_finds_the_closed_form(flops, name):
    law = LAWS[name]
    exact, searched = best_for_flops(law, flops), best_for_flops(law, flops, PLENTY)
    assert math.isclose(searched.N, exact.N, rel_tol=1e-5)
    assert searched.loss == pytest.approx(exact.loss, rel=1e-12)
    assert math.isclose(exact.N, law.parameters_for(exact.D), rel_tol=1e-9)
    assert math.isclose(exact.D, law.tokens_for(exact.N), rel_tol=1e-9)


@given(budgets, st.floats(0.2, 5.0))
def test_nothing_else_that_a_budget_buys_is_better(flops, times):
    best = best_for_flops(CHINCHILLA, flops)
    assert CHINCHILLA.loss(best.N * times, best.D / times) >= best.loss


@given(budgets)
def test_at_the_optimum_a_run_gains_what_the_frontier_does(flops):
    """The envelope theorem: the price is |dL*/dC|, and a run's own |dL/dC| at fixed N there."""
    best = best_for_flops(CHINCHILLA, flops)
    assert own_slope(CHINCHILLA, best.N, best.D) == pytest.approx(best.price, rel=1e-5)
    exact = CHINCHILLA.beta * CHINCHILLA.B / best.D**CHINCHILLA.beta / flops
    assert best.price == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    "conditions", [Conditions(served=2e12), Conditions(unique=25e9), Conditions(unique=1e9)]
)
def test_the_price_is_the_slope_of_the_frontier(conditions):
    """With serving a FLOP more goes to the same N at the optimum, to first order; repeats alike."""
    law = LAWS["muennighoff"]
    flops = 1e22
    less, more = (best_for_flops(law, flops * side, conditions).loss for side in (0.99, 1.01))
    best = best_for_flops(law, flops, conditions)
    assert best.price == pytest.approx((less - more) / (0.02 * flops), rel=1e-3)
    assert own_slope(law, best.N, best.D, conditions) == pytest.approx(best.price, rel=1e-3)


def test_past_its_best_use_a_run_gains_less_than_the_price():
    small, large = (own_slope(CHINCHILLA, N, 1e22 / 6 / N) for N in (1e9, 1e11))
    assert small < price(CHINCHILLA, 1e22) < large


def brute_force(law: Law, flops: float, conditions: Conditions) -> tuple[float, float]:
    """N and loss by trying two hundred thousand."""
    most = flops / (conditions.training + conditions.serving * conditions.served)
    N = np.geomspace(1e4, most, 200_000)
    D = (flops - conditions.serving * N * conditions.served) / (conditions.training * N)
    loss = law.loss(N[D > 0], D[D > 0], conditions.unique)
    best = int(np.argmin(loss))
    return float(N[best]), float(loss[best])


@pytest.mark.parametrize("flops", [1e20, 1e22, 1e24])
@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(served=1e12),
        Conditions(unique=3e9),
        Conditions(unique=3e9, served=1e11),
        Conditions(training=8.0, serving=3.0, served=1e11),
    ],
)
def test_brute_force_finds_nothing_better(flops, conditions):
    law = LAWS["muennighoff"]
    best = best_for_flops(law, flops, conditions)
    N, loss = brute_force(law, flops, conditions)
    assert best.loss <= loss * (1 + 1e-12)
    assert math.isclose(best.N, N, rel_tol=0.01)
    assert conditions.flops(best.N, best.D) == pytest.approx(flops)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e19, 1e24), st.sampled_from([0.0, 1e11, 2e12]))
def test_the_least_budget_for_a_loss_is_the_one_that_reaches_it(flops, served):
    conditions = Conditions(served=served)
    reached = best_for_flops(CHINCHILLA, flops, conditions)
    back = least_for_loss(CHINCHILLA, float(reached.loss), conditions)
    assert back.flops == pytest.approx(flops, rel=1e-6)
    assert back.loss == pytest.approx(reached.loss, rel=1e-9)


def test_serving_makes_models_smaller():
    """arXiv:2401.00448, figure 1: 13B with 2T tokens to serve is better trained as 7B, for 1.7e22
    FLOPs (17%) less in all."""
    law = LAWS["sardana"]
    conditions = Conditions(served=2e12)
    D = law.tokens_for(13e9)
    before = conditions.flops(13e9, D)
    best = least_for_loss(law, float(law.loss(13e9, D)), conditions)
    assert math.isclose(best.N, 7e9, rel_tol=0.02)
    assert 1 - best.flops / before == pytest.approx(0.17, abs=0.01)
    assert before - best.flops == pytest.approx(1.7e22, rel=0.02)


def test_few_unique_tokens_are_repeated():
    """The example in the code of arXiv:2305.16264: 227B tokens, 9.1 epochs, 6.8B parameters."""
    best = best_for_flops(LAWS["muennighoff"], 6 * 8.67e9 * 178e9, Conditions(unique=25e9))
    assert math.isclose(best.D, 227e9, rel_tol=0.01)
    assert best.epochs == pytest.approx(9.1, abs=0.05)
    assert math.isclose(best.N, 6.8e9, rel_tol=0.01)
    assert 0 < best.last_epoch_worth < 1


def test_many_laws_at_once_answer_as_each_alone():
    laws = [CHINCHILLA, LAWS["hoffmann"]]
    both = Law(**{k: np.array([getattr(law, k) for law in laws]) for k in vars(CHINCHILLA)})
    conditions = Conditions(served=1e12)
    for ask in (
        lambda law: best_for_flops(law, 1e23, conditions),
        lambda law: least_for_loss(law, 2.2, conditions),
    ):
        together, alone = ask(both), [ask(law) for law in laws]
        for name in ("N", "D", "loss", "flops", "price"):
            expected = [getattr(each, name) for each in alone]
            np.testing.assert_allclose(getattr(together, name), expected, rtol=1e-6)


def test_a_loss_out_of_reach_is_told():
    with pytest.raises(ValueError, match=r"no budget reaches a loss of 1.8: this law ends at 1.81"):
        least_for_loss(CHINCHILLA, 1.8)
    few = Conditions(unique=1e9)
    with pytest.raises(ValueError, match="more unique tokens"):
        least_for_loss(LAWS["muennighoff"], 2.0, few)


def test_a_law_of_tokens_alone_allocates_nothing():
    with pytest.raises(ValueError, match="knows tokens alone"):
        best_for_flops(Law(E=1.0, A=0.0, B=9.0, alpha=1.0, beta=0.3), 1e20)


def test_serving_may_take_all():
    with pytest.raises(ValueError, match="do not train a thousand parameters"):
        allocation.check_budget(1e12, Conditions(served=2e12))
