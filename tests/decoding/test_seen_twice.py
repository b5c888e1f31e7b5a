"""The two-line rules: first, and seen twice."""

from __future__ import annotations

import pytest

from tests.decoding.recorded import MEANS, recorded, replayed
from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Sample


def asked_with(answers: str) -> Asked:
    asked = Asked("q")
    for answer in answers:
        asked.add(Sample(model="m", answer=None if answer == "-" else answer))
    return asked


@pytest.mark.parametrize(
    ("answers", "next_draws", "answer"),
    [
        ("", 2, None),
        ("a", 1, None),
        ("ab", 1, None),
        ("--", 2, None),
        ("aa", 0, "a"),
        ("abb", 0, "b"),
        ("abcde", 0, "a"),
        ("-----", 0, None),
    ],
)
def test_seen_twice(answers, next_draws, answer):
    action = resolve("policy", "seen_twice").decide(asked_with(answers), MEANS)
    if next_draws:
        assert action == Draw(model="m", count=next_draws)
    else:
        assert isinstance(action, Finish)
        assert action.answer == answer


def test_first_takes_what_comes():
    policy = resolve("policy", "first")
    assert policy.decide(Asked("q"), MEANS) == Draw(model="m")
    assert policy.decide(asked_with("a"), MEANS).answer == "a"
    assert policy.decide(asked_with("-"), MEANS).given_up


def test_the_first_reading_of_seen_twice():
    found, drawn = replayed(resolve("policy", "seen_twice"), recorded("codex001_addsub"))
    assert found == pytest.approx(0.600, abs=0.004)
    assert drawn == pytest.approx(3.2, abs=0.05)
