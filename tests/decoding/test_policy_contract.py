"""What every decoding policy must fulfil, whatever comes back."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.resolve import all_names, method_class, resolve, summary
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, Offer, Outcome, Sample

POLICIES = all_names("policy")
MODELS = ("small", "large")
LEAST_SAMPLES = {"cascade": 4}
"""Of those that need more than one, and refuse a limit below it."""
Stream = Callable[[str, int], str | Exception | None]

STREAMS: dict[str, Stream] = {
    "agreeing": lambda id, n: "42",
    "never agreeing": lambda id, n: f"{id}-{n}",
    "two by turns": lambda id, n: "ab"[n % 2],
    "half unreadable": lambda id, n: "42" if n % 2 else None,
    "unreadable": lambda id, n: None,
    "empty": lambda id, n: "",
    "failing": lambda id, n: OSError("down"),
    "failing at times": lambda id, n: OSError("down") if n % 3 else "42",
    "failing after a while": lambda id, n: "abc"[n % 3] if n < 4 else OSError("down"),
}


def means(**changes: Any) -> Means:
    offers = (Offer(model="small", tokens=100), Offer(model="large", cost=3.0, tokens=100))
    return dataclasses.replace(
        Means(offers=offers, price=0.01, num_open=3, max_samples=17), **changes
    )


def outcomes() -> list[Outcome]:
    """60 questions of both models; the larger one is right more often."""
    found = []
    for place in range(60):
        for share, model in ((0.5, "small"), (0.8, "large")):
            right = [(7 * place + 3 * draw) % 10 < 10 * share for draw in range(8)]
            answers = tuple("gold" if each else f"wrong {draw}" for draw, each in enumerate(right))
            found.append(
                Outcome(
                    id=str(place),
                    model=model,
                    answers=answers,
                    correct=tuple(map(float, right)),
                    prompt=f"what is {place} and {place % 7}?",
                )
            )
    return found


def ready(name: str, at_hand: Means) -> tuple[DecodingPolicy, Means]:
    """The policy, and the means with what it learns from outcomes."""
    policy = resolve("policy", name)
    at_hand = dataclasses.replace(at_hand, learnt=learnt(name))
    policy.check(at_hand)
    return policy, at_hand


@cache
def learnt(name: str) -> dict[str, Any]:
    found: dict[str, Any] = resolve("policy", name).fit(outcomes(), means())
    return found


def sample(draw: Draw, answer: str | None, number: int) -> Sample:
    thought = draw.purpose == "thought"
    return Sample(
        model=draw.model,
        answer=None if thought else answer,
        reward=0.1 * (number % 7),
        confidence=0.5,
        tokens=min(draw.max_tokens or 100, 100),
        text="so" if thought else str(answer),
        ended=not thought,
        purpose=draw.purpose,
    )


def play(
    policy: DecodingPolicy, at_hand: Means, stream: Stream, id: str = "q"
) -> tuple[Finish, Asked, list[Action]]:
    """One question to its end, every action asked for twice on equal states."""
    asked, number, actions = Asked(id, "how many are 6 times 7?"), 0, []
    for _ in range(4 * at_hand.max_samples + 4):
        now = dataclasses.replace(at_hand, past=(asked.copy(),))
        action = policy.decide_all([asked], now)[0]
        assert action == policy.decide_all([copy.deepcopy(asked)], copy.deepcopy(now))[0]
        actions.append(action)
        if isinstance(action, Finish):
            return action, asked, actions
        assert isinstance(action, Draw)
        assert action.model in MODELS
        assert isinstance(action.count, int)
        assert action.count >= 1
        assert action.max_tokens is None or action.max_tokens >= 1
        assert not math.isnan(action.rate)
        for _ in range(action.count):
            said = stream(id, number)
            number += 1
            if isinstance(said, Exception):
                asked.failed += 1
            else:
                asked.add(sample(action, said, number))
        assert len(asked.samples) <= at_hand.max_samples
        assert asked.failed <= max(3, at_hand.max_samples)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("name", POLICIES)
def test_options_have_defaults_and_it_is_described(name):
    cls = method_class("policy", name)
    assert cls.__dataclass_params__.frozen
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))
    assert summary(cls).endswith(".")
    assert cls.source
    assert cls.needs in ("answers", "rewards", "thoughts", "nothing")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.long
def test_it_ends_within_the_limit_and_says_why(name, stream):
    for most in (1, 2, 3, 17):
        if most < LEAST_SAMPLES.get(name, 1):
            with pytest.raises(ValueError, match="\nhint: "):
                ready(name, means(max_samples=most))
            continue
        policy, at_hand = ready(name, means(max_samples=most))
        finish, asked, actions = play(policy, at_hand, STREAMS[stream])
        assert finish.reason
        assert 0 <= finish.confidence <= 1
        assert isinstance(actions[0], Draw), "nothing was asked"
        if finish.answer is not None:
            assert finish.answer in asked.counts
        elif asked.counts:
            raise AssertionError("an answer was read, and none is given")
        else:
            assert finish.given_up
        again, _, actions_again = play(policy, at_hand, STREAMS[stream])
        assert (again, actions_again) == (finish, actions)


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_questions_changes_nothing(name):
    policy, at_hand = ready(name, means(max_samples=40))
    questions = []
    for place, stream in enumerate(STREAMS.values()):
        asked = Asked(f"q{place}", f"question {place}")
        for number in range(place):
            said = stream(asked.id, number)
            if isinstance(said, Exception):
                asked.failed += 1
            else:
                asked.add(sample(Draw(model="small"), said, number))
        questions.append(asked)
    at_hand = dataclasses.replace(at_hand, num_open=len(questions), past=tuple(questions))
    forward = policy.decide_all(questions, at_hand)
    backward = policy.decide_all(questions[::-1], at_hand)
    assert forward == backward[::-1]
    assert len(forward) == len(questions)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_cut_off_is_answered_with_what_there_is(name):
    policy, at_hand = ready(name, means())
    asked = Asked("q")
    assert policy.close(asked, at_hand, "the budget is spent").given_up
    for number, answer in enumerate(("a", "b", "b", None)):
        asked.add(sample(Draw(model="small"), answer, number))
    finish = policy.close(asked, at_hand, "the budget is spent")
    assert finish.answer in ("a", "b")
    assert "the budget is spent" in finish.reason


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_that_is_not_there_is_an_error_before_anything_is_drawn(name):
    cls = method_class("policy", name)
    if "model" not in {field.name for field in dataclasses.fields(cls)}:
        pytest.skip("it names no model")
    with pytest.raises(ValueError, match="no model 'absent' to ask\nhint: at hand: small, large"):
        resolve("policy", {name: {"model": "absent"}}).check(means())


def test_pandora_refuses_where_a_sample_costs_nothing():
    with pytest.raises(ValueError, match=r"no cost\nhint: .*cost_in_reward"):
        resolve("policy", "pandora").check(means(price=0.0))
    resolve("policy", {"pandora": {"cost_in_reward": 0.1}}).check(means(price=0.0))
