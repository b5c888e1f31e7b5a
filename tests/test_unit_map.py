"""From nats to a score: a map that is calibrated, or refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thrifty.core.budget import Cost
from thrifty.core.marginal import Estimate, Option, choose
from thrifty.scaling.unit_map import UnitMap, calibrate

LOSSES = (3.0, 2.6, 2.2, 1.9, 1.7, 1.6)


def sigmoid(loss: float) -> float:
    return 1 / (1 + math.exp(4 * loss - 8))


def fitted(noise: float = 0.0, seed: int = 0, losses=LOSSES) -> UnitMap:
    random = np.random.default_rng(seed)
    scores = [float(np.clip(sigmoid(x) + noise * random.normal(), 0, 1)) for x in losses]
    return calibrate(losses, scores, [max(noise, 1e-3)] * len(losses), unit="number")


def test_the_curve_that_made_the_points_is_found():
    found = fitted()
    assert (found.a, found.b) == (pytest.approx(8, rel=1e-3), pytest.approx(4, rel=1e-3))
    for loss in LOSSES:
        assert found.score(loss)[0] == pytest.approx(sigmoid(loss), abs=1e-4)
    assert (found.low, found.high, found.num_points) == (1.6, 3.0, 6)


def test_a_gain_is_the_difference_of_two_scores():
    gain = fitted().gain(Estimate(0.2, 0.05, "nats/token", "history"), 2.0)
    assert gain.mean == pytest.approx(sigmoid(1.8) - sigmoid(2.0), abs=1e-3)
    slope = 4 * sigmoid(1.8) * (1 - sigmoid(1.8))
    assert gain.stderr == pytest.approx(0.05 * slope, rel=0.02)
    assert (gain.unit, gain.source) == ("number", "history")


def test_its_errors_are_those_of_repeated_runs():
    points = [fitted(0.03, seed).score(1.8) for seed in range(200)]
    means = np.array([mean for mean, _ in points])
    said = float(np.mean([error for _, error in points]))
    assert abs(means.mean() - sigmoid(1.8)) < 0.01
    assert 0.7 < means.std() / said < 1.3
    gains = [
        fitted(0.03, seed).gain(Estimate(0.3, 0.0, "nats/token", "pilot"), 2.0)
        for seed in range(200)
    ]
    spread, said = np.std([g.mean for g in gains]), np.mean([g.stderr for g in gains])
    assert 0.7 < spread / said < 1.3


@pytest.mark.parametrize(
    ("losses", "scores", "says"),
    [
        ((3.0, 2.0, 1.5), (0.0, 0.3, 0.5), "by 3 evaluations .* takes 4"),
        ((2.0, 2.0, 2.0, 1.5, 1.5), (0.0, 0.0, 0.1, 0.5, 0.4), "by 2 evaluations"),
        ((3.0, 2.5, 2.0, 1.5), (0.0, 0.0, 0.0, 0.0), "within its noise"),
        ((3.0, 2.5, 2.0, 1.5), (0.6, 0.4, 0.3, 0.1), "did not rise as the loss fell"),
        ((3.0, float("nan"), 2.0, 1.5), (0.1, 0.2, 0.3, 0.5), "by 3 evaluations"),
    ],
)
def test_it_is_refused_where_the_points_tell_of_none(losses, scores, says):
    with pytest.raises(ValueError, match=rf"{says}[\s\S]*\nhint: "):
        calibrate(losses, scores, [0.02] * len(losses), unit="number")


def test_units_are_not_mixed_without_the_map():
    in_nats = Option("refresh", Estimate(0.2, 0.02, "nats/token", "pilot"), Cost(flops=1e9))
    in_points = Option("train on", Estimate(0.05, 0.01, "number", "history"), Cost(flops=1e9))
    with pytest.raises(ValueError, match="gains in nats/token and number cannot be compared"):
        choose([in_nats, in_points], resource="flops")
    mapped = Option("refresh", fitted().gain(in_nats.gain, 2.0), in_nats.cost)
    assert choose([mapped, in_points], resource="flops").chosen == "refresh"
    with pytest.raises(ValueError, match="a gain in number is no gain in nats/token"):
        fitted().gain(in_points.gain, 2.0)
