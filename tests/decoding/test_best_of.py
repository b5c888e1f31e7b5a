"""Which sample is the best one, and what is told where rewards are missing."""

from __future__ import annotations

import math

import pytest

from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Means, Offer, Sample

MEANS = Means(offers=(Offer(model="m"),), max_samples=8)


def asked_with(*samples: tuple[str | None, float | None]) -> Asked:
    asked = Asked("q")
    for answer, reward in samples:
        asked.add(Sample(model="m", answer=answer, reward=reward, text=f"says {answer}"))
    return asked


@pytest.mark.parametrize(
    ("samples", "answer", "says"),
    [
        ([("a", 1.0), ("b", 3.0), ("a", 2.0)], "b", "reward 3"),
        ([("a", -5.0), ("b", -5.0), ("c", -6.0)], "a", "reward -5"),
        ([("a", 1.0), ("b", None), ("b", None)], "a", "2 of 3 have no reward"),
        ([("a", 1.0), ("b", math.nan), ("b", 0.5)], "a", "1 of 3 have no reward"),
        ([("a", None), ("b", None), ("b", None)], "b", "3 of 3 have no reward: the vote"),
        ([("a", 1.0), (None, 9.0), ("b", 2.0)], "b", "reward 2"),
        ([("a", None), (None, 9.0), ("a", None)], "a", "the vote"),
        ([("a", -math.inf), ("b", math.inf), ("a", 0.0)], "b", "reward inf"),
        ([(None, 1.0), (None, 2.0), (None, 0.0)], None, "no readable answer"),
    ],
)
def test_the_highest_reward(samples, answer, says):
    finish = resolve("policy", {"best_of": {"samples": 3}}).decide(asked_with(*samples), MEANS)
    assert isinstance(finish, Finish)
    assert (finish.answer, finish.given_up) == (answer, answer is None)
    assert says in finish.reason
    if answer is None:
        assert finish.text == "says None"


def test_an_empty_answer_is_one():
    finish = resolve("policy", {"best_of": {"samples": 2}}).decide(
        asked_with(("", 2.0), ("a", 1.0)), MEANS
    )
    assert (finish.answer, finish.confidence, finish.given_up) == ("", 0.5, False)


def test_it_draws_all_at_once_and_failed_ones_count():
    policy = resolve("policy", {"best_of": {"samples": 5}})
    asked = asked_with(("a", 1.0))
    assert policy.decide(Asked("q"), MEANS) == Draw(model="m", count=5)
    asked.failed = 3
    assert policy.decide(asked, MEANS) == Draw(model="m", count=1)
    asked.failed = 4
    assert isinstance(policy.decide(asked, MEANS), Finish)
