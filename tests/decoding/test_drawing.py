"""Which draws come next: who is first, what a limit allows, who is asked again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.sampling import Action, Asked, Draw, Means, Offer, Sample, vote
from thrifty.drawing import LEARN_EVERY, Drawing


@dataclass(frozen=True, kw_only=True)
class UntilEnough(DecodingPolicy):
    """As many samples as the question's name says; rates by its number."""

    source: ClassVar[str] = "tests"
    pooled: ClassVar[bool] = False
    rated: bool = False

    def decide(self, asked: Asked, means: Means) -> Action:
        wanted = int(asked.id.split("-")[1])
        if len(asked.samples) + asked.failed >= wanted:
            return vote(asked, "enough")
        return Draw(model="m", rate=float(asked.id.split("-")[0]) if self.rated else math.inf)


class Seeing(UntilEnough):
    """Notes how much of the others it sees."""

    seen: ClassVar[list[int]] = []
    pooled: ClassVar[bool] = True

    def decide_all(self, questions: object, means: Means) -> list[Action]:  # type: ignore[override]
        Seeing.seen.append(sum(len(asked.samples) for asked in means.past))
        return [self.decide(asked, means) for asked in questions]  # type: ignore[attr-defined]


def means(left: float = math.inf, cost: float = 1.0, resource: str = "samples") -> Means:
    return Means(offers=(Offer(model="m", cost=cost),), left=left, resource=resource)


def sample(cost: float = 1.0) -> Sample:
    return Sample(model="m", answer="a", cost=cost)


def drain(drawing: Drawing, most: int = 1) -> list[str]:
    order = []
    while batch := drawing.next(most):
        for asked, draw in batch:
            order.append(asked.id)
            drawing.came_back(asked, [sample()] * draw.count, float(draw.count))
    return order


def test_of_equals_those_with_the_fewest_samples_come_first() -> None:
    questions = [Asked("0-3"), Asked("1-3"), Asked("2-1")]
    drawing = Drawing(UntilEnough(), questions, means())
    assert drain(drawing) == ["0-3", "1-3", "2-1", "0-3", "1-3", "0-3", "1-3"]
    assert {finish.reason for finish in drawing.finished.values()} == {"enough"}


def test_the_highest_rate_comes_first_and_the_rest_hears_that_it_is_over() -> None:
    questions = [Asked("1-2"), Asked("3-2"), Asked("2-2")]
    drawing = Drawing(UntilEnough(rated=True), questions, means(left=3))
    assert drain(drawing) == ["3-2", "3-2", "2-2"]
    assert drawing.spent == 3
    assert "spent on others; one more here would bring 2 a unit" in drawing.finished["2-2"].reason
    assert drawing.finished["1-2"].given_up


def test_at_most_so_many_are_under_way() -> None:
    drawing = Drawing(UntilEnough(), [Asked(f"{i}-1") for i in range(5)], means())
    first = drawing.next(2)
    assert [asked.id for asked, _ in first] == ["0-1", "1-1"]
    assert drawing.next(2) == []
    drawing.came_back(first[0][0], [sample()], 1.0)
    assert [asked.id for asked, _ in drawing.next(2)] == ["2-1"]
    assert drawing.next(2) == []


def test_a_limit_waits_for_what_is_under_way_to_cost_less() -> None:
    drawing = Drawing(UntilEnough(), [Asked("0-1"), Asked("1-1")], means(left=15.0, cost=10.0))
    ((asked, _),) = drawing.next(2)
    assert drawing.next(2) == []
    drawing.came_back(asked, [sample(4.0)], 4.0)
    assert [asked.id for asked, _ in drawing.next(2)] == ["1-1"]


def test_what_a_sample_costs_is_learnt_from_those_that_came() -> None:
    questions = [Asked(f"{i}-1") for i in range(9)]
    drawing = Drawing(UntilEnough(), questions, means(left=30.0, cost=10.0, resource="tokens"))
    order = []
    while batch := drawing.next(1):
        for asked, _ in batch:
            order.append(asked.id)
            drawing.came_back(asked, [sample(4.0)], 4.0)
    assert len(order) == 7
    assert drawing.spent == 28.0


def test_a_draw_is_cut_to_what_is_left() -> None:
    class Five(UntilEnough):
        def decide(self, asked: Asked, means: Means) -> Action:
            return vote(asked, "done") if asked.samples else Draw(model="m", count=5)

    drawing = Drawing(Five(), [Asked("0-1"), Asked("1-1")], means(left=7))
    counts = [draw.count for _, draw in drawing.next(2)]
    assert counts == [3, 4]  # nobody is worth more than the other


def test_after_the_end_whoever_comes_back_is_closed() -> None:
    drawing = Drawing(UntilEnough(), [Asked("0-9"), Asked("1-9")], means())
    ((asked, _),) = drawing.next(1)
    drawing.close_all("over")
    assert drawing.finished["1-9"].reason.startswith("over")
    drawing.came_back(asked, [sample()], 1.0)
    assert drawing.next(1) == []
    assert drawing.finished["0-9"].reason == "over"


def test_a_pooled_policy_sees_the_others_ever_more_rarely() -> None:
    Seeing.seen.clear()
    drain(Drawing(Seeing(), [Asked(f"{i}-20") for i in range(10)], means()))
    looks = sorted(set(Seeing.seen))
    assert looks[0] == 0
    assert len(looks) < 20
    assert all(b <= LEARN_EVERY * a + 1 for a, b in pairwise(looks[2:]))
    assert looks[-1] > 100


def test_a_failed_draw_is_heard_of() -> None:
    drawing = Drawing(UntilEnough(), [Asked("0-2")], means())
    for _ in range(2):
        ((asked, _),) = drawing.next(1)
        drawing.failed(asked, 1, 0.5)
    assert drawing.next(1) == []
    assert drawing.finished["0-2"].answer is None
    assert drawing.spent == 1.0


def test_two_questions_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="unique"):
        Drawing(UntilEnough(), [Asked("0-1"), Asked("0-1")], means())
