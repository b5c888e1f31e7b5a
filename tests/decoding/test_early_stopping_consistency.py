"""Where a window agrees, and the first readings on recorded samples."""

from __future__ import annotations

import pytest

from tests.decoding.recorded import MEANS, recorded, replayed
from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Sample


def decided(answers: str, failed: int = 0, **options: int):
    """``answers``: a letter each, ``-`` for one that cannot be read."""
    asked = Asked("q")
    for answer in answers:
        asked.add(Sample(model="m", answer=None if answer == "-" else answer))
    asked.failed = failed
    return resolve("policy", {"early_stopping_consistency": {"window": 3, **options}}).decide(
        asked, MEANS
    )


@pytest.mark.parametrize(
    ("answers", "answer"),
    [("aaa", "a"), ("abaaaa", "a"), ("bbabbabbaaaa", "b")],
)
def test_a_window_that_agrees_ends_it_and_all_samples_vote(answers, answer):
    finish = decided(answers)
    assert isinstance(finish, Finish)
    assert finish.answer == answer


@pytest.mark.parametrize(
    ("answers", "failed", "count"),
    [("", 0, 3), ("a", 0, 2), ("aab", 0, 3), ("aabb", 2, 2), ("baaab", 0, 1), ("---", 0, 3)],
)
def test_a_window_is_filled(answers, failed, count):
    assert decided(answers, failed) == Draw(model="m", count=count)


def test_the_limit_holds_whatever_came():
    assert decided("abcab", samples=7, failed=1) == Draw(model="m", count=1)
    finish = decided("abcab", samples=7, failed=2)
    assert isinstance(finish, Finish)
    assert "no window of 3 agrees" in finish.reason


@pytest.mark.parametrize(
    ("name", "accuracy", "samples"),
    [("codex001_addsub", 0.672, 26.8), ("mot_gpt35_date_cot1_40", 0.650, 14.5)],
)
def test_the_first_readings(name, accuracy, samples):
    policy = resolve("policy", "early_stopping_consistency")
    found, drawn = replayed(policy, recorded(name))
    assert found == pytest.approx(accuracy, abs=0.004)
    assert drawn == pytest.approx(samples, abs=0.3)
