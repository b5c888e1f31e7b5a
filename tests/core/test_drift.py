"""Drift of scores, and beliefs after two looks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from thrifty.drift import Scale, drift, mixed, rank_correlation, turn

random = np.random.default_rng(0)


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_spearmans(ties):
    left, right = random.normal(size=(2, 200))
    if ties:
        left, right = np.round(left), np.round(right)
    assert rank_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)


def test_scores_of_the_same_order_have_not_drifted():
    scores = random.normal(size=(50, 2))
    assert drift(scores, np.exp(scores)).mean == pytest.approx(0.0)
    assert drift(scores, -scores).mean == pytest.approx(2.0)


def test_the_error_is_that_of_many_probes():
    """Of probes of 256 rows whose two looks correlate by 0.6, the drift spreads as it says."""
    found = []
    for _ in range(300):
        left, noise = random.normal(size=(2, 256, 1))
        found.append(drift(left, 0.6 * left + 0.8 * noise))
    assert np.std([each.mean for each in found]) == pytest.approx(found[0].stderr, rel=0.25)


def test_rows_that_a_look_did_not_reach_do_not_count():
    then = random.normal(size=(40, 1))
    now = then.copy()
    now[:10] = np.nan
    assert drift(then, now).mean == pytest.approx(0.0)
    assert drift(then[:3], now[:3]).stderr == 2.0


def test_a_constant_score_tells_nothing_apart():
    flat = np.zeros((20, 1))
    assert drift(flat, flat).mean == 0.0
    assert drift(flat, random.normal(size=(20, 1))).mean == 1.0
    assert np.isfinite(Scale.of(flat).standard(flat)).all()


def test_a_scale_is_undone():
    scores = random.normal(3.0, 5.0, size=(100, 2))
    scale = Scale.of(scores)
    assert np.allclose(scale.back(scale.standard(scores)), scores)
    assert abs(np.median(scale.standard(scores))) < 1e-9


def test_beliefs_weigh_both_looks():
    then, now = np.array([[1.0], [np.nan], [2.0]]), np.array([[3.0], [4.0], [np.nan]])
    assert mixed(then, now, 0.25).ravel().tolist() == [1.5, 4.0, 2.0]
    assert np.array_equal(mixed(then, now, 1.0)[:1], now[:1])


def test_a_turn_is_that_of_directions():
    one = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert turn(one, 3 * one) == pytest.approx(0.0)
    assert turn(one, one[:, ::-1]) == pytest.approx(1.0)
    assert turn(one, -one) == pytest.approx(2.0)
    assert turn(None, one) is None
