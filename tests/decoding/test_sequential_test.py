"""The promise of the sequential test: how often a settled answer is not the most likely one."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tests.decoding.recorded import MEANS
from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Sample
from thrifty.decoding.sequential_test import Bets


def settled(shares: list[float], error: float, most: int, rng: random.Random) -> int | None:
    """The answer that it settles on, of answers drawn with these shares."""
    bets, numbers = Bets(-math.log(error)), {}
    for answer in rng.choices(range(len(shares)), shares, k=most):
        bets.add(numbers.setdefault(answer, len(numbers)))
        if bets.missing == 0:
            return next(each for each, number in numbers.items() if number == bets.leader)
    return None


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize(
    "shares",
    [
        [0.5001, 0.4999],
        [0.34, 0.33, 0.33],
        [0.45, 0.44, 0.11],
        [0.101, *[0.0999] * 9],
        [0.26, 0.25, *[0.0049] * 100],
        [0.002, *[0.000998] * 1000],
    ],
    ids=["two", "three", "a third", "ten", "two of many", "a thousand"],
)
def test_errors_are_as_rare_as_promised(shares, error):
    """The nearest ties are the worst; answers never seen so far may be the right one."""
    rng, trials = random.Random(f"{shares}{error}"), 300
    wrong = 0
    for _ in range(trials):
        answer = settled(shares, error, 60, rng)
        wrong += answer is not None and shares[answer] < max(shares)
    assert wrong <= trials * error + 3 * math.sqrt(trials * error * (1 - error))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.4, 0.6), (0.3, 0.3, 0.4), (0.2, 0.5, 0.3)])
def test_no_wealth_against_a_most_likely_answer_grows_on_average(shares):
    """Exactly, over every sequence of six: a supermartingale."""
    best = shares.index(max(shares))
    expected = [0.0] * 7
    for sequence in itertools.product(range(len(shares)), repeat=6):
        bets, numbers, chance = Bets(math.inf), {}, 1.0
        for length, answer in enumerate(sequence, 1):
            bets.add(numbers.setdefault(answer, len(numbers)))
            chance *= shares[answer]
            later = len(shares) ** (6 - length)  # sequences that begin alike
            place = numbers.get(best, len(bets.wealth) - 1)
            expected[length] += chance * math.exp(bets.wealth[place]) / later
    assert all(each <= 1 + 1e-9 for each in expected[1:])
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(expected[1:]))


def test_an_easy_question_is_settled_soon():
    rng = random.Random(0)
    answers = [settled([0.9, 0.05, 0.05], 0.05, 40, rng) for _ in range(200)]
    assert answers.count(0) >= 190


def play(stream: str, at_once: int, **options: float) -> tuple[int, Finish]:
    policy = resolve("policy", {"sequential_test": options})
    asked = Asked("q")
    while isinstance(action := policy.decide(asked, MEANS), Draw):
        start = len(asked.samples)
        for answer in stream[start : start + min(action.count, at_once)]:
            asked.add(Sample(model="m", answer=None if answer == "-" else answer))
    return len(asked.samples), action


def test_answers_that_all_agree_settle_it_and_unreadable_ones_do_not():
    number, finish = play("a" * 40, 40)
    assert number <= 7
    assert "refuted" in finish.reason
    assert play("-" * 40, 40)[1].given_up
    assert "unsettled" in play("ab" * 20, 40)[1].reason
    fewer, _ = play("a" * 40, 40, error=0.2)
    more, _ = play("a" * 40, 40, error=0.001)
    assert fewer < number < more


def test_it_draws_no_more_than_what_could_settle_it():
    rng = random.Random(3)
    for _ in range(60):
        stream = "".join(rng.choice("aaaaabbc-") for _ in range(40))
        assert play(stream, 1) == play(stream, 40)
