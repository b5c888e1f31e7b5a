"""The forms of laws: their formulas beside naive ones, their derivatives beside differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.scaling import filtered_data, fine_tuning, repeats, sum_of_powers
from thrifty.scaling.filtered_data import Filtered, best_mixture, mixed_loss
from thrifty.scaling.laws import Law
from thrifty.scaling.points import Points
from thrifty.scaling.published import PUBLISHED

MUENNIGHOFF = PUBLISHED["muennighoff"].law
CHINCHILLA = PUBLISHED["besiroglu"].law

amounts = st.floats(min_value=1e5, max_value=1e13)


def differences(predict, x, step=1e-6):
    """[starts, n, p] by central differences."""
    columns = []
    for i in range(x.shape[1]):
        move = np.zeros_like(x)
        move[:, i] = step
        columns.append((predict(x + move)[0] - predict(x - move)[0]) / (2 * step))
    return np.stack(columns, axis=2)


def some_points(random, n=30):
    N = np.exp(random.uniform(np.log(1e7), np.log(1e10), n))
    D = np.exp(random.uniform(np.log(1e8), np.log(1e11), n))
    return Points(
        N=N,
        D=D,
        loss=np.ones(n),
        unique=D / random.uniform(0.5, 60, n),
        lines=np.arange(n),
    )


@pytest.mark.parametrize("terms", [1, 2])
def test_derivatives_of_powers(terms):
    random = np.random.default_rng(0)
    logs = random.uniform(-3, 3, (terms, 25))
    x = random.normal(0, 0.7, (4, 2 * terms + 1))
    _, jacobian = sum_of_powers.predict(x, logs)
    expected = differences(lambda x: sum_of_powers.predict(x, logs), x)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-7, atol=1e-9)


def test_derivatives_of_repeats():
    random = np.random.default_rng(1)
    points = some_points(random)
    x = np.log(random.uniform(0.3, 80, (5, 2)))
    _, jacobian = repeats.predict(x, CHINCHILLA, points)
    expected = differences(lambda x: repeats.predict(x, CHINCHILLA, points), x)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6, atol=1e-9)


def test_derivatives_of_fine_tuning_also_without_any():
    random = np.random.default_rng(2)
    D = np.append([0.0], np.geomspace(200, 2e6, 12))
    x = np.stack([random.normal(size=4), random.normal(5, 1, 4), random.normal(4, 1, 4)], 1)
    x = np.hstack([x, random.normal(-0.5, 0.3, (4, 1))])
    log_loss, jacobian = fine_tuning.predict(x, D)
    expected = differences(lambda x: fine_tuning.predict(x, D), x)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6, atol=1e-9)
    E, B, D_l, beta = np.exp(x[0])
    law = fine_tuning.Rectified(E=E, B=B, D_l=D_l, beta=beta)
    np.testing.assert_allclose(np.exp(log_loss[0]), law.loss(D), rtol=1e-12)


def test_repeats_predict_what_the_law_says():
    points = some_points(np.random.default_rng(3))
    log_loss, _ = repeats.predict(np.log([[15.0, 5.0]]), CHINCHILLA, points)
    law = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658, R_D=15.0, R_N=5.0)
    expected = law.loss(points.N, points.D, points.unique)
    np.testing.assert_allclose(np.exp(log_loss[0]), expected, rtol=1e-12)


def naive_loss(law: Law, N: float, D: float, U: float) -> float:
    """As printed in arXiv:2305.16264, a number at a time."""
    U_D = min(U, D)
    R_D = D / U_D - 1
    best = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    U_N = min(N, (U_D * best) ** (law.beta / law.alpha) * best)
    R_N = N / U_N - 1
    tokens = U_D + U_D * law.R_D * (1 - math.exp(-R_D / law.R_D))
    parameters = U_N + U_N * law.R_N * (1 - math.exp(-R_N / law.R_N))
    return law.E + law.A / parameters**law.alpha + law.B / tokens**law.beta


@given(amounts, amounts, amounts)
def test_loss_is_the_printed_formula(N, D, U):
    assert MUENNIGHOFF.loss(N, D, U) == pytest.approx(naive_loss(MUENNIGHOFF, N, D, U), rel=1e-9)


def test_loss_is_the_published_number():
    assert MUENNIGHOFF.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
    assert MUENNIGHOFF.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-12)


@given(amounts, amounts, amounts, st.floats(1.01, 10))
def test_more_is_never_worse_and_repeats_never_better_than_fresh(N, D, U, times):
    slack = 1 + 1e-12
    loss = MUENNIGHOFF.loss(N, D, U)
    assert MUENNIGHOFF.loss(N * times, D, U) <= loss * slack
    assert MUENNIGHOFF.loss(N, D * times, U) <= loss * slack
    assert MUENNIGHOFF.loss(N, D, U * times) <= loss * slack
    assert CHINCHILLA.loss(N, D, U) == CHINCHILLA.loss(N, D)


def test_many_laws_at_once_answer_as_each_alone():
    laws = [CHINCHILLA, PUBLISHED["hoffmann"].law, MUENNIGHOFF]
    names = ("E", "A", "B", "alpha", "beta", "R_D", "R_N")
    all_of_them = Law(**{name: np.array([getattr(law, name) for law in laws]) for name in names})
    alone = [law.loss(1e9, 1e11, 1e10) for law in laws]
    np.testing.assert_allclose(all_of_them.loss(1e9, 1e11, 1e10), alone, rtol=1e-14)


def naive_filtered(pools, unique, tokens):
    """The differential equation in small steps."""
    y, n = pools[0].A, 1.0
    epoch = unique * len(pools)
    for after in np.geomspace(1.0, tokens, 200_001)[1:]:
        repeat = math.floor((n + after) / 2 / epoch)
        b = sum(p.b * 0.5 ** (repeat / (p.tau * len(pools))) for p in pools)
        y *= 1 - b / len(pools) * (after - n) / n
        n = after
    return y + pools[0].E


STRICT = Filtered(E=0.05, A=1.2, b=0.25, tau=3.0)
WIDE = Filtered(E=0.05, A=1.2, b=0.15, tau=6.0)


@pytest.mark.parametrize("pools", [[STRICT], [STRICT, WIDE]])
def test_filtered_data_is_its_differential_equation(pools):
    expected = naive_filtered(pools, 128.0, 1280.0)
    assert mixed_loss(pools, 128.0, 1280.0) == pytest.approx(expected, rel=2e-4)
    if len(pools) == 1:
        assert STRICT.loss(1280.0, 128.0) == pytest.approx(expected, rel=2e-4)


def test_derivatives_of_filtered_data():
    random = np.random.default_rng(4)
    unique = random.uniform(50, 500, 20)
    growth = filtered_data.log_growth(unique * random.uniform(0.3, 30, 20), unique)
    x = np.log(random.uniform([0.5, 1, 0.05, 0.5], [2, 9, 0.5, 20], (6, 4)))
    _, jacobian = filtered_data.predict(x, growth)
    expected = differences(lambda x: filtered_data.predict(x, growth), x)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6, atol=1e-9)


def test_the_wider_filter_wins_with_more_compute():
    pools = [Filtered(E=0.0, A=1.0, b=b, tau=2.0) for b in (0.3, 0.2)]
    chosen = [best_mixture(pools, 128.0, 128.0 * passes) for passes in (1, 4, 16, 64)]
    assert chosen[0] == 1
    assert chosen[-1] == 2
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("wrong", [{"D": 0.0}, {"unique": -1.0}, {"scale": 0.0}, {"pools": []}])
def test_filtered_data_refuses_what_is_no_amount(wrong):
    given = {"pools": [STRICT], "unique": 1.0, "D": 2.0} | wrong
    with pytest.raises(ValueError, match="more than no tokens\nhint"):
        mixed_loss(**given)
