"""Both criteria against their definitions, and the first readings on recorded samples."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import integrate, special, stats

from tests.decoding.recorded import MEANS, recorded, replayed
from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Sample
from thrifty.decoding.adaptive_consistency import ahead_of_all, ahead_of_next


def asked_with(*answers: str | None) -> Asked:
    asked = Asked("q")
    for answer in answers:
        asked.add(Sample(model="m", answer=answer))
    return asked


def test_beta_is_the_tail_of_the_beta_distribution():
    for most in (0, 1, 2, 5, 17, 40):
        for next_most in range(most + 1):
            expected = stats.beta.sf(0.5, most + 1, next_most + 1)
            assert ahead_of_next(most, next_most) == pytest.approx(expected, abs=1e-12)


def by_quadrature(counts: tuple[int, ...]) -> float:
    def density(g: float) -> float:
        log = counts[0] * math.log(g) - g - math.lgamma(counts[0] + 1)
        return float(math.exp(log) * np.prod(special.gammainc(np.array(counts[1:]) + 1, g)))

    middle = counts[0] + 1.0
    reach = 12 * middle**0.5 + 40
    found, _ = integrate.quad(
        density, max(1e-9, middle - reach), middle + reach, points=[middle], epsabs=1e-12, limit=400
    )
    return float(found)


def test_dirichlet_is_its_integral():
    rng = random.Random(0)
    for _ in range(25):
        size, most = rng.randint(3, 9), rng.choice((2, 10, 40, 400))
        counts = tuple(sorted((rng.randint(1, most) for _ in range(size)), reverse=True))
        assert ahead_of_all(counts) == pytest.approx(by_quadrature(counts), abs=1e-9)
    assert ahead_of_all((1, 1, 1)) == pytest.approx(1 / 3, abs=1e-12)
    assert ahead_of_all((7,) * 10) == pytest.approx(0.1, abs=1e-12)
    for counts in ((4,), (4, 2)):
        assert ahead_of_all(counts) == ahead_of_next(*(*counts, 0)[:2])


def test_dirichlet_is_what_draws_of_it_say():
    rng = np.random.default_rng(0)
    for counts in ((5, 3, 1), (12, 10, 9, 1, 1), (3, 1, 1, 1)):
        drawn = rng.dirichlet(np.array(counts) + 1.0, size=200_000)
        share = float(np.mean(drawn.argmax(axis=1) == 0))
        assert ahead_of_all(counts) == pytest.approx(share, abs=5 * (0.25 / 200_000) ** 0.5)


def test_it_draws_no_more_than_what_could_settle_it():
    """Sample by sample it stops at the same place as in one go."""
    rng = random.Random(1)
    for criterion in ("beta", "dirichlet"):
        policy = resolve("policy", {"adaptive_consistency": {"criterion": criterion}})
        for _ in range(60):
            stream = [rng.choice("aaabbc") for _ in range(40)]
            ends = []
            for at_once in (1, 40):
                asked = Asked("q")
                while isinstance(action := policy.decide(asked, MEANS), Draw):
                    start = len(asked.samples)
                    for answer in stream[start : start + min(action.count, at_once)]:
                        asked.add(Sample(model="m", answer=answer))
                ends.append((len(asked.samples), action))
            assert ends[0] == ends[1]


@pytest.mark.parametrize(("threshold", "needed"), [(0.75, 1), (0.9, 3), (0.95, 4), (0.99, 6)])
def test_answers_that_all_agree(threshold, needed):
    policy = resolve("policy", {"adaptive_consistency": {"threshold": threshold}})
    assert policy.decide(Asked("q"), MEANS) == Draw(model="m", count=needed)
    finish = policy.decide(asked_with(*["a"] * needed), MEANS)
    assert isinstance(finish, Finish)
    assert finish.answer == "a"


def test_what_cannot_be_read_settles_nothing():
    policy = resolve("policy", "adaptive_consistency")
    assert policy.decide(asked_with(*[None] * 30), MEANS) == Draw(model="m", count=4)
    finish = policy.decide(asked_with(*[None] * 40), MEANS)
    assert isinstance(finish, Finish)
    assert finish.given_up
    assert "40 without a readable answer" in finish.reason


@pytest.mark.parametrize(
    ("name", "accuracy", "samples"),
    [("codex001_addsub", 0.671, 18.7), ("mot_gpt35_date_cot1_40", 0.651, 10.3)],
)
def test_the_first_readings(name, accuracy, samples):
    found, drawn = replayed(resolve("policy", "adaptive_consistency"), recorded(name))
    assert found == pytest.approx(accuracy, abs=0.003)
    assert drawn == pytest.approx(samples, abs=0.3)
