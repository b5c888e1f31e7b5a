"""Questions that come one by one: the mean of their samples is kept, and nothing of them but how
answers spread."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thrifty.core.sampling import Asked, Draw, Finish, Means, Offer, Sample
from thrifty.decoding.marginal import Marginal
from thrifty.drawing import Drawing
from thrifty.serving import one_by_one
from thrifty.serving.one_by_one import FIRST_PRICE, REMEMBERED, STEP, OneByOne


def asked_with(*answers: str | None) -> Asked:
    asked = Asked("q", "a client's secret question")
    for answer in answers:
        asked.add(Sample(model="m", answer=answer, text=f"I say {answer}"))
    return asked


def test_the_mean_is_off_by_no_more_than_is_said() -> None:
    flow, random, drawn = OneByOne(3.0), np.random.default_rng(0), 0
    for _ in range(400):
        wanted = 1 + random.poisson(0.02 / flow.price("a") ** 0.7)  # dearer, fewer
        asked = asked_with(*["x"] * min(wanted, 20))
        drawn += asked.num_drawn
        flow.note("a", asked)
    off = abs(math.log(flow.price("a") / FIRST_PRICE)) / (STEP * 400)
    assert drawn / 400 == pytest.approx(3.0, rel=off + 1e-9)
    assert off < 0.1


def test_each_key_has_a_price_of_its_own() -> None:
    flow = OneByOne(2.0)
    for _ in range(5):
        flow.note("hard", asked_with(*"abcdefgh"))
        flow.note("easy", asked_with("a"))
    assert flow.price("hard") > FIRST_PRICE > flow.price("easy")
    assert flow.price("new") == FIRST_PRICE


def test_a_price_stays_where_it_can_come_back_from() -> None:
    flow = OneByOne(8.0)
    for _ in range(500):
        flow.note("a", asked_with("x"))
    assert flow.price("a") == one_by_one.PRICES[0]


def test_without_a_mean_there_is_no_price() -> None:
    flow = OneByOne()
    flow.note("a", asked_with("x", "y"))
    assert flow.price("a") == 0


@pytest.mark.parametrize("mean", [0.0, -1.0, math.inf, math.nan])
def test_no_mean(mean: float) -> None:
    with pytest.raises(ValueError, match="hint: --samples 3"):
        OneByOne(mean)


def test_what_is_remembered_holds_no_word_and_has_an_end() -> None:
    flow = OneByOne()
    for i in range(2 * REMEMBERED):
        flow.note("a", asked_with("secret", None, f"word {i}", "secret"))
    assert 0 < len(flow.past) <= REMEMBERED
    (past, *_) = flow.past
    assert list(past.counts.values()) == [2, 1]
    assert past.num_drawn == 4
    kept = f"{past.id} {past.prompt} {past.samples}"
    assert "secret" not in kept
    assert "word" not in kept


def test_learnt_anew_when_there_is_half_as_much_again() -> None:
    flow, seen = OneByOne(), []
    for _ in range(100):
        flow.note("a", asked_with("x"))
        seen.append(len(flow.past))
    assert sorted(set(seen)) == [1, 2, 3, 5, 8, 12, 18, 27, 41, 62, 93]


def played(flow: OneByOne, deck: list[str], policy: Marginal) -> tuple[Asked, Finish]:
    """One question, as a request is answered."""
    asked, place = Asked("q"), 0
    means = Means(
        offers=(Offer(model="m"),),
        left=1e9,
        more_to_come=True,
        max_samples=len(deck),
        price=flow.price("a"),
        past=flow.past,
    )
    drawing = Drawing(policy, [asked], means)
    while batch := drawing.next(1):
        for _, draw in batch:
            said = [Sample(model="m", answer=x) for x in deck[place : place + draw.count]]
            place += draw.count
            drawing.came_back(asked, said, float(len(said)))
    flow.note("a", asked)
    return asked, drawing.finished["q"]


def test_hard_questions_get_what_easy_ones_leave() -> None:
    """Half of the questions are always answered alike, half are right six times in ten."""
    random, flow, policy = np.random.default_rng(3), OneByOne(3.0), Marginal()
    drawn: dict[bool, list[int]] = {True: [], False: []}
    right, three = [], []
    for number in range(300):
        hard = bool(number % 2)
        deck = ["1" if not hard or random.random() < 0.6 else "2" for _ in range(8)]
        asked, finish = played(flow, deck, policy)
        if number >= 50:
            drawn[hard].append(asked.num_drawn)
            right.append(finish.answer == "1")
            three.append(deck[:3].count("1") > 1)
    assert np.mean(drawn[True] + drawn[False]) == pytest.approx(3.0, abs=0.3)
    assert np.mean(drawn[True]) > 1.5 * np.mean(drawn[False])
    assert np.mean(right) > np.mean(three)


def test_a_budget_that_later_questions_live_off_is_not_spent_on_one() -> None:
    asked = asked_with("x", "x", "x", "x")
    alone = Means(offers=(Offer(model="m"),), left=1e9)
    more = Means(offers=(Offer(model="m"),), left=1e9, more_to_come=True)
    assert isinstance(Marginal().decide(asked, alone), Draw)
    assert isinstance(Marginal().decide(asked, more), Finish)
