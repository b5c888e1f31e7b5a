"""What the FLOPs left bring as samples, from evaluations made by hand, beside the same worked out
the long way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation
from thrifty.core.plan_serving import Serving
from thrifty.sampling_price import SamplingPrice, curve_of, flops_a_sample

SIZES = [1, 2, 4, 8]
EACH = 1e9
"""FLOPs of a sample."""
SERVING = Serving(questions=100, max_samples=8)
INTERVAL = Cost(flops=1e11, tokens=4e5, seconds=20.0)
"""What one more sample of each question takes."""


def row(
    step: int,
    accuracy: Sequence[float],
    *,
    flops: float | None = None,
    stderr: Sequence[float | None] = (0.04, 0.03, 0.02, 0.01),
    each: float = EACH,
) -> dict[str, Any]:
    """Of an evaluation, as the ledger has it."""
    votes = {
        "samples": SIZES,
        "accuracy": list(accuracy),
        "stderr": list(stderr),
        "flops_a_sample": each,
    }
    return {
        "step": step,
        "flops": 1e11 * step if flops is None else flops,
        "beside": {"votes": votes},
    }


PLAIN = {"step": 0, "flops": 0.0, "beside": {}}
"""An evaluation that drew no samples."""
FIRST = row(1, [0.30, 0.36, 0.42, 0.44])
LAST = row(2, [0.40, 0.50, 0.56, 0.60])


def priced(
    *rows: Mapping[str, Any], left: float = 4e11, serving: Serving = SERVING
) -> SamplingPrice:
    return SamplingPrice(serving, lambda: list(rows), lambda: left)


def naive_accuracy(votes: Mapping[str, Any], samples: float) -> float:
    """Some questions get ``low`` samples and the others ``high``, whichever two do best; what no
    vote makes better is not drawn."""
    points = [(0.0, 0.0), *zip(votes["samples"], votes["accuracy"], strict=True)]
    found = [height for size, height in points if size <= samples]
    for low, below in points:
        for high, above in points:
            if low <= samples <= high and low < high:
                share = (samples - low) / (high - low)
                found.append((1 - share) * below + share * above)
    return max(found)


def naive_samples(left: float, serving: Serving, each: float = EACH) -> float:
    return min(max(left, 0.0) / (serving.questions * each), serving.max_samples)


def naive_price(
    last: Mapping[str, Any], left: float, serving: Serving, interval: Cost, resource: str
) -> float:
    votes = last["beside"]["votes"]
    now, then = (
        naive_accuracy(votes, naive_samples(each, serving, votes["flops_a_sample"]))
        for each in (left, left - interval.flops)
    )
    return (now - then) / interval.of(resource)


def test_a_price_worked_out_by_hand():
    """4 samples a question are left, .56 right; an interval takes one of them: from 2 to 4 samples
    each brings .03."""
    assert priced(FIRST, LAST)("flops", INTERVAL) == pytest.approx(0.03 / 1e11)


@pytest.mark.parametrize("resource", ["flops", "tokens", "seconds"])
@pytest.mark.parametrize("left", [5e10, 1e11, 2.5e11, 4e11, 7.9e11, 8.5e11, 3e12])
@pytest.mark.parametrize(
    "accuracy",
    [
        [0.40, 0.50, 0.56, 0.60],
        [0.40, 0.41, 0.55, 0.58],  # two samples bring less than half of what four do
        [0.40, 0.45, 0.44, 0.43],  # voting makes it worse
        [0.00, 0.00, 0.00, 0.00],
    ],
)
def test_the_price_is_what_the_interval_takes_away(accuracy, left, resource):
    last = row(2, accuracy)
    found = priced(FIRST, last, left=left)(resource, INTERVAL)
    expected = naive_price(last, left, SERVING, INTERVAL, resource)
    amount = INTERVAL.of(resource)
    assert found * amount == pytest.approx(expected * amount, abs=1e-12)
    assert found >= 0


def test_in_another_resource_an_interval_costs_the_same():
    price = priced(LAST)
    flops = price("flops", INTERVAL) * INTERVAL.flops
    assert flops > 0
    for resource in ("tokens", "seconds"):
        assert price(resource, INTERVAL) * INTERVAL.of(resource) == pytest.approx(flops)


@pytest.mark.parametrize(
    "interval",
    [
        Cost(tokens=10.0, seconds=1.0),  # takes no FLOPs: no sample fewer
        Cost(flops=1e11),  # none of the resource
        Cost(flops=1e11, dollars=None),  # nobody knows
    ],
)
def test_of_an_interval_that_takes_none_there_is_no_price(interval):
    assert priced(LAST)("dollars", interval) == 0.0


def test_before_the_first_evaluation_nothing_is_known():
    for rows in ([], [PLAIN]):
        price = priced(*rows)
        assert price("flops", INTERVAL) == 0.0
        assert price.history() == []
        assert price.samples() == 0.0
        assert price.told(INTERVAL) == {}


def test_evaluations_without_votes_are_passed_over():
    with_votes = priced(FIRST, LAST)
    mixed = priced(PLAIN, FIRST, PLAIN | {"step": 1}, LAST, PLAIN | {"step": 3})
    assert mixed("flops", INTERVAL) == with_votes("flops", INTERVAL)
    assert mixed.history() == with_votes.history()
    assert mixed.told(INTERVAL) == with_votes.told(INTERVAL)


@pytest.mark.parametrize("left", [0.0, -1e12])
def test_with_nothing_left_a_sample_costs_nothing_and_training_goes_by_one(left):
    price = priced(FIRST, LAST, left=left)
    assert price("flops", INTERVAL) == 0.0
    assert price.samples() == 0.0
    assert [each.loss for each in price.history()] == pytest.approx([0.70, 0.60])
    told = price.told(INTERVAL)
    assert (told["samples"], told["accuracy"]) == (0.0, 0.0)


def test_where_more_is_left_than_votes_can_use_training_is_free():
    assert priced(LAST, left=1e15)("flops", INTERVAL) == 0.0


def test_the_last_evaluation_decides_and_what_is_left_is_asked_anew():
    rows, left = [FIRST], [4e11]
    price = SamplingPrice(SERVING, lambda: rows, lambda: left[0])
    before = price("flops", INTERVAL)
    assert before == pytest.approx(naive_price(FIRST, 4e11, SERVING, INTERVAL, "flops"))
    rows.append(LAST)
    assert price("flops", INTERVAL) != before
    left[0] = 1.5e11
    expected = naive_price(LAST, 1.5e11, SERVING, INTERVAL, "flops")
    assert price("flops", INTERVAL) == pytest.approx(expected)


@pytest.mark.parametrize("left", [1e11, 3e11, 4e11, 6.5e11, 1e13])
def test_the_history_is_the_vote_over_as_many_samples_as_are_left_now(left):
    history = priced(FIRST, LAST, left=left).history()
    samples = max(naive_samples(left, SERVING), 1.0)
    nearest = min(SIZES, key=lambda size: abs(size - samples))
    for found, given in zip(history, (FIRST, LAST), strict=True):
        votes = given["beside"]["votes"]
        assert found == Evaluation(
            step=given["step"],
            flops=given["flops"],
            loss=pytest.approx(1 - naive_accuracy(votes, samples)),
            stderr=votes["stderr"][SIZES.index(nearest)],
        )


def test_an_error_that_nobody_knows_is_endless():
    unknown = row(1, [0.3] * 4, stderr=[None] * 4)
    (found,) = priced(unknown).history()
    assert found.stderr == math.inf


def test_samples_left_but_for_something():
    price = priced(LAST, left=4e11)
    assert price.samples() == pytest.approx(4.0)
    assert price.samples(less=1e11) == pytest.approx(3.0)
    assert price.samples(less=9e11) == 0.0
    assert priced(LAST, left=1e15).samples() == SERVING.max_samples


def test_where_nothing_could_be_generated_nothing_is_divided_by_nothing():
    mute = row(1, [0.0] * 4, each=0.0)
    assert flops_a_sample(mute["beside"]["votes"]) == 1.0
    price = priced(mute)
    assert price("flops", INTERVAL) == 0.0
    assert price.samples() == SERVING.max_samples


def test_what_a_decision_rests_on_is_told():
    told = priced(FIRST, LAST).told(INTERVAL)
    votes = LAST["beside"]["votes"]
    assert told == {
        "questions": 100,
        "flops_left": 4e11,
        "flops_a_sample": EACH,
        "samples": pytest.approx(4.0),
        "accuracy": pytest.approx(naive_accuracy(votes, 4.0)),
        "samples_after_interval": pytest.approx(3.0),
        "accuracy_after_interval": pytest.approx(naive_accuracy(votes, 3.0)),
        "most_useful_samples": 8,
        "jointly": None,  # two evaluations tell of no curve
    }
    lost = told["accuracy"] - told["accuracy_after_interval"]
    assert priced(FIRST, LAST)("flops", INTERVAL) * INTERVAL.flops == pytest.approx(lost)


def test_evaluations_at_the_same_flops_tell_of_no_curve():
    same = [row(step, [0.3, 0.36, 0.4, 0.42], flops=1e11 * min(step, 2)) for step in (1, 2, 3)]
    assert priced(*same).told(INTERVAL)["jointly"] is None


def saturated(flops: float, size: int) -> float:
    return (1 - math.exp(-flops / 3e11)) * (0.5 + 0.1 * math.log2(size))


def learning(count: int = 5) -> list[dict[str, Any]]:
    return [
        row(step, [saturated(1e11 * step, size) for size in SIZES], stderr=[1e-3] * 4)
        for step in range(1, count + 1)
    ]


def test_jointly_it_is_the_best_way_from_here():
    """On a grid of lengths, by the very curve that the evaluations were made with."""
    rows, left = learning(), 6e11
    told = priced(*rows, left=left).told(INTERVAL)["jointly"]
    spent = rows[-1]["flops"]
    ways = [
        (saturated(end, size), end, size)
        for size in SIZES
        for end in (spent + left * step / 128 for step in range(129))
        if end + SERVING.questions * size * EACH <= spent + left
    ]
    best = max(ways)
    assert told["best"]["samples"] == best[2]
    assert told["best"]["accuracy"] == pytest.approx(best[0], abs=0.01)
    assert told["best"]["training_flops"] == pytest.approx(best[1], rel=0.15)
    assert told["longest"]["samples"] == 1
    assert told["longest"]["training_flops"] >= told["best"]["training_flops"]
    for way in (told["best"], told["longest"]):
        assert way["training_flops"] >= spent
        assert way["flops_a_sample"] == EACH
        answering = SERVING.questions * way["samples"] * EACH
        assert way["training_flops"] + answering <= (spent + left) * (1 + 1e-9)
    saved = told["longest"]["training_flops"] - told["best"]["training_flops"]
    dearer = (told["best"]["samples"] - 1) * EACH
    assert told["break_even_questions"] == pytest.approx(saved / dearer)


def test_where_not_one_sample_each_can_be_paid_for_there_is_no_best_way():
    assert priced(*learning(), left=5e10).told(INTERVAL)["jointly"] is None


def test_a_curve_of_what_the_ledger_keeps():
    curve = curve_of(LAST["beside"]["votes"])
    assert (curve.sizes, curve.accuracy) == ((1, 2, 4, 8), (0.40, 0.50, 0.56, 0.60))
