"""Thoughts that are cut, extended and probed, by a model that does as it is told."""

from __future__ import annotations

import dataclasses

import pytest

from thrifty.core.resolve import resolve
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, Offer, Sample

MEANS = Means(offers=(Offer(model="m"),), max_samples=40)


@dataclasses.dataclass
class Thinker:
    """Thinks ``length`` words, a token each; its answer, asked for after n words, is
    ``answer(n)``. Told to wait it thinks ``more`` words."""

    length: int
    more: int = 0
    answer: str = "42"
    changes_until: int = 0
    """Words of thought until which its answer still changes."""

    def draw(self, draw: Draw) -> Sample:
        words = draw.prefix.count("w ")
        if draw.purpose != "thought":
            changing = words < self.changes_until
            said = f"{words}" if changing else self.answer
            return Sample(model="m", answer=said, text=f" {said}", tokens=1, purpose=draw.purpose)
        wanted = self.length + self.more * draw.prefix.count("Wait") - words
        room = draw.max_tokens
        assert room is not None
        assert draw.stop == ("</think>",)
        number = max(0, min(wanted, room))
        return Sample(
            model="m",
            answer=None,
            text="w " * number,
            tokens=number,
            ended=wanted <= room,
            purpose="thought",
        )


def run(name: str, model: Thinker, means: Means = MEANS, **options) -> tuple[Finish, list[Draw]]:
    policy, asked, draws = resolve("policy", {name: options}), Asked("q"), []
    action: Action
    while isinstance(action := policy.decide(asked, means), Draw):
        draws.append(action)
        assert action.count == 1
        asked.add(model.draw(action))
        assert len(draws) <= means.max_samples
    return action, draws


def test_a_thought_that_ends_in_between_is_left_alone():
    finish, draws = run("budget_forcing", Thinker(50), max_thinking=100, min_thinking=20)
    assert [draw.purpose for draw in draws] == ["thought", "answer"]
    assert draws[0].max_tokens == 100
    assert draws[0].prefix == "<think>\n"
    assert draws[1].prefix == "<think>\n" + "w " * 50 + "</think>"
    assert finish.answer == "42"
    assert finish.reason == "50 tokens of thought"


def test_a_thought_that_is_too_long_is_cut_and_answered():
    finish, draws = run("budget_forcing", Thinker(5000), max_thinking=100)
    assert [draw.purpose for draw in draws] == ["thought", "answer"]
    assert draws[1].prefix == "<think>\n" + "w " * 100 + "</think>\n\nFinal Answer:"
    assert draws[1].reason.endswith("cut")
    assert finish.answer == "42"


def test_a_thought_that_is_too_short_is_told_to_go_on():
    finish, draws = run("budget_forcing", Thinker(30, more=30), max_thinking=100, min_thinking=80)
    assert [draw.purpose for draw in draws] == ["thought"] * 3 + ["answer"]
    assert [draw.max_tokens for draw in draws[:3]] == [100, 70, 40]
    assert draws[2].prefix == "<think>\n" + ("w " * 30 + "\nWait") * 2
    assert draws[3].prefix.endswith("w </think>")
    assert "told 2 times to go on" in finish.reason


@pytest.mark.parametrize("name", ["budget_forcing", "probe_exit"])
def test_a_model_that_says_nothing_more_is_not_asked_for_ever(name):
    options = {"min_thinking": 90} if name == "budget_forcing" else {}
    finish, draws = run(name, Thinker(0), max_thinking=100, **options)
    assert len(draws) <= 3
    assert finish.answer == "42"


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["budget_forcing", "probe_exit"])
def test_a_limit_of_few_draws_leaves_one_for_the_answer(name, most):
    means = dataclasses.replace(MEANS, max_samples=most)
    finish, draws = run(name, Thinker(10_000, changes_until=10_000), means, max_thinking=1000)
    assert draws[-1].purpose == "answer"
    assert finish.answer is not None
    thought = sum(draw.max_tokens or 0 for draw in draws if draw.purpose == "thought")
    assert thought == (0 if most == 1 else 1000)


def test_probes_that_agree_end_the_thought():
    model = Thinker(10_000, changes_until=300)
    finish, draws = run("probe_exit", model, chunk=100, agreeing=3, max_thinking=2000)
    assert [draw.purpose for draw in draws] == ["thought", "probe"] * 5 + ["answer"]
    assert draws[1].prefix.endswith("w \n\nI can answer by now. Final Answer:")
    assert draws[2].prefix == "<think>\n" + "w " * 100, "the probe is no part of the thought"
    assert draws[-1].prefix == "<think>\n" + "w " * 500 + "</think>\n\nFinal Answer:"
    assert "the last 3 agree" in finish.reason


def test_doubt_is_no_agreement():
    class Doubting(Thinker):
        def draw(self, draw: Draw) -> Sample:
            said = super().draw(draw)
            if draw.purpose == "probe" and draw.prefix.count("w ") < 600:
                return dataclasses.replace(said, text=" 42? Hmm, wait")
            return said

    _, draws = run("probe_exit", Doubting(10_000), chunk=100, agreeing=2, max_thinking=2000)
    assert [draw.purpose for draw in draws].count("probe") == 7


def test_chunks_are_larger_where_draws_are_few():
    means = dataclasses.replace(MEANS, max_samples=9)
    _, draws = run(
        "probe_exit", Thinker(10**6, changes_until=10**6), means, chunk=10, max_thinking=1000
    )
    assert [draw.max_tokens for draw in draws if draw.purpose == "thought"] == [250] * 4


def test_a_thought_that_ends_by_itself_needs_no_cue():
    _, draws = run("probe_exit", Thinker(150, changes_until=999), chunk=100, max_thinking=900)
    assert [draw.purpose for draw in draws] == ["thought", "probe", "thought", "answer"]
    assert draws[-1].prefix == "<think>\n" + "w " * 150 + "</think>"


def test_probes_that_fail_end_at_the_limit():
    policy, asked = resolve("policy", "probe_exit"), Asked("q")
    asked.add(Sample(model="m", answer=None, text="w", tokens=1, ended=False, purpose="thought"))
    for _ in range(100):
        action = policy.decide(asked, MEANS)
        if isinstance(action, Finish):
            break
        asked.failed += 1
    assert asked.failed == 39
    assert isinstance(action, Finish)
    assert action.given_up


def test_the_least_is_not_more_than_the_most():
    with pytest.raises(ValueError, match="min_thinking must be from 0 to 10, not 20"):
        resolve("policy", {"budget_forcing": {"min_thinking": 20, "max_thinking": 10}})
    with pytest.raises(ValueError, match="end must be the text"):
        resolve("policy", {"probe_exit": {"end": ""}})
