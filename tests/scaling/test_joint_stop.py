"""How long to train and how many samples to draw, chosen together."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.sampling import Outcome
from thrifty.scaling.joint_stop import (
    VoteCurve,
    Way,
    best_way,
    break_even,
    samples_left,
    sampling_price,
)
from thrifty.scaling.saturation import RATES, fit_saturation
from thrifty.scaling.vote_accuracy import right_votes, vote_accuracy, vote_sizes

# -- the accuracy of checkpoints ------------------------------------------------------------------


def saturating(flops: float, a: float = 0.6, b: float = 3e-15, c: float = 0.2) -> float:
    return a * (1 - math.exp(-b * flops)) + c


@pytest.mark.parametrize("b", [5e-16, 2e-15, 1e-14])
def test_a_curve_of_the_form_is_found_again(b):
    flops = np.linspace(0, 1e15, 9)
    fit = fit_saturation(flops, [saturating(x, b=b) for x in flops], [1e-3] * 9)
    for x in (2.5e14, 1e15, 1.5e15):
        mean, stderr = fit.at(x)
        assert mean == pytest.approx(saturating(x, b=b), abs=max(3 * stderr, 2e-3))
        assert stderr < 0.05


def test_error_bars_cover_what_comes_and_grow_with_the_distance():
    """From the first half of noisy runs the accuracy at twice their end."""
    random, covered, widths = np.random.default_rng(0), 0, []
    flops = np.linspace(0, 5e14, 5)
    for _ in range(200):
        noisy = [saturating(x, b=4e-15) + random.normal(0, 0.02) for x in flops]
        fit = fit_saturation(flops, noisy, [0.02] * 5)
        mean, stderr = fit.at(1e15)
        covered += abs(mean - saturating(1e15, b=4e-15)) < 1.645 * stderr
        widths.append(fit.at(1e15)[1] / fit.at(5e14)[1])
    assert 0.85 <= covered / 200 <= 1.0
    assert min(widths) > 1


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=8),
    st.floats(0.005, 0.2),
)
@settings(deadline=None, max_examples=60)
def test_it_only_rises_and_ever_more_slowly(accuracies, stderr):
    flops = [1e14 * (i + 1) for i in range(len(accuracies))]
    fit = fit_saturation(flops, accuracies, [stderr] * len(flops))
    mean = np.array([fit.at(x)[0] for x in np.linspace(0, 2 * flops[-1], 25)])
    assert ((mean >= 0) & (mean <= 1)).all()
    assert (np.diff(mean) >= -1e-9).all()
    inside = (mean > 1e-9) & (mean < 1 - 1e-9)
    assert (np.diff(mean[inside], n=2) <= 1e-9).all()
    assert all(math.isfinite(fit.at(x)[1]) for x in flops)


def test_the_cut_at_zero_is_that_of_a_gaussian_drawn_at_random():
    """Accuracies that fall: of the curves with a < 0 none counts."""
    flops, falling = [1e14, 2e14, 3e14], [0.5, 0.45, 0.42]
    fit = fit_saturation(flops, falling, [0.05] * 3)
    random, drawn = np.random.default_rng(1), []
    for place in random.choice(len(fit.weights), size=4000, p=fit.weights):
        mean, covariance = fit.mean[place], fit.covariance[place]
        some = random.multivariate_normal(mean, covariance, size=200)
        kept = some[some[:, 0] >= 0]
        if len(kept):
            b = RATES[place]
            drawn.append(kept[0, 0] * (1 - math.exp(-b * 4 / 3)) + kept[0, 1])
    mean, stderr = fit.at(4e14)
    assert mean == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / len(drawn) ** 0.5 + 1e-3)
    assert stderr == pytest.approx(np.std(drawn), rel=0.1)


def test_what_is_not_finite_is_left_out_and_errors_that_are_not_told_come_from_the_scatter():
    flops = [0.0, 1e14, 2e14, 3e14, 4e14]
    plain = [saturating(x) for x in flops]
    told = fit_saturation(flops, plain, [0.0, math.inf, math.nan, 0.01, 0.01])
    untold = fit_saturation([*flops, 5e14], [*plain, math.nan])
    assert told.at(6e14) == pytest.approx(untold.at(6e14))
    for few in (flops[:2], [1e14] * 5):
        with pytest.raises(ValueError, match=r"takes 3 checkpoints .*, not [12]\nhint: "):
            fit_saturation(few, plain[: len(few)])


# -- votes over samples with gold answers ---------------------------------------------------------


def naive_votes(answers: list[str | None], right: set[str], size: int) -> float:
    """Every order in which ``size`` of the samples can come; the leader that came first answers."""
    found = []
    for order in itertools.permutations(answers, size):
        counts = Counter(a for a in order if a is not None)
        leader = max(counts, key=counts.__getitem__, default=None)
        found.append(leader in right)
    return float(np.mean(found))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_up_to_what_was_drawn_it_is_the_mean_over_all_subsets(answers):
    counts = Counter(a for a in answers if a is not None)
    for right in ({"a"}, {"a", "b"}, set()):
        found = right_votes(
            tuple(counts.values()),
            [answer in right for answer in counts],
            len(answers) - counts.total(),
        )
        naive = [naive_votes(answers, right, size) for size in range(len(answers) + 1)]
        assert found == pytest.approx(naive, abs=1e-12)


def outcome(answers: list[str | None], gold: str = "a", name: str = "q") -> Outcome:
    return Outcome(
        id=name,
        model="m",
        answers=tuple(answers),
        correct=tuple(float(answer == gold) for answer in answers),
    )


def drawn_from(random: np.random.Generator, alphas: np.ndarray, size: int) -> list[Outcome]:
    """A question for each row of answer probabilities, the first answer right."""
    return [outcome(list(random.choice(list("abcd"), size=size, p=p))) for p in alphas]


def test_of_many_questions_it_is_right_on_average_below_and_above_what_was_drawn():
    """Against votes drawn afresh: from 8 samples, with 40 the estimate is within 3 points."""
    random = np.random.default_rng(3)
    questions = random.dirichlet([0.9, 0.5, 0.4, 0.4], size=1500)
    sizes = (1, 2, 3, 5, 8, 12, 20, 40)
    found = vote_accuracy(drawn_from(random, questions, 8), sizes).mean(axis=0)
    for size, estimate in zip(sizes, found, strict=True):
        fresh = [
            naive_leader(random.choice(list("abcd"), size=size, p=p)) == "a"
            for p in questions
            for _ in range(3)
        ]
        assert estimate == pytest.approx(np.mean(fresh), abs=0.03), size
    assert (np.diff(found[4:]) >= 0).all()


def naive_leader(answers) -> str:
    counts = Counter(answers)
    return max(counts, key=counts.__getitem__)


def test_questions_without_a_readable_answer_or_a_sample_are_wrong():
    found = vote_accuracy([outcome([None] * 4), outcome([]), outcome(["a"] * 4)], (1, 4, 16))
    assert (found[:2] == 0).all()
    assert found[2] == pytest.approx([1, 1, 1])
    assert vote_accuracy([], (1, 2)).shape == (0, 2)


def test_sizes_rise_to_the_last():
    assert vote_sizes(1) == (1,)
    assert vote_sizes(12) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
    assert vote_sizes(40)[-1] == 40
    assert len(vote_sizes(256)) < 30


# -- the choice -----------------------------------------------------------------------------------

CURVE = VoteCurve((1, 2, 3, 4, 5, 8), (0.40, 0.40, 0.50, 0.48, 0.54, 0.54))


def test_between_whole_numbers_some_questions_get_one_more():
    assert CURVE.at(0) == 0
    assert CURVE.at(0.5) == pytest.approx(0.2), "half of the questions are answered"
    assert CURVE.at(2) == pytest.approx(0.45), "half of them with 3, rather than all with 2"
    assert CURVE.at(4) == pytest.approx(0.52)
    assert CURVE.at(99) == 0.54
    assert CURVE.most_useful == 5
    assert VoteCurve((1, 2), (0.0, 0.0)).at(1) == 0.0


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0, 12),
    st.floats(0, 12),
)
def test_the_hull_is_above_rises_and_bends_down(accuracy, x, y):
    curve = VoteCurve(tuple(range(1, len(accuracy) + 1)), tuple(accuracy))
    assert all(curve.at(k) >= a - 1e-12 for k, a in zip(curve.sizes, accuracy, strict=True))
    low, high = sorted((x, y))
    assert curve.at(low) <= curve.at(high) + 1e-12
    assert curve.at((x + y) / 2) >= (curve.at(x) + curve.at(y)) / 2 - 1e-9
    assert curve.at(high) <= max(accuracy) + 1e-12


def test_the_price_of_an_interval_is_what_its_flops_would_have_brought():
    common = {"questions": 100, "flops_a_sample": 1e9, "max_samples": 8}
    price = sampling_price(CURVE, left=4e11, interval=1e11, **common)
    assert price == pytest.approx((0.52 - 0.50) / 1e11)
    last = sampling_price(CURVE, left=1e11, interval=1e11, **common)
    assert last == pytest.approx(0.40 / 1e11), "nothing would be answered"
    assert sampling_price(CURVE, left=9e11, interval=1e11, **common) == 0.0, "more is no use"
    assert sampling_price(CURVE, left=-1.0, interval=1e11, **common) == 0.0
    assert samples_left(4e11, 100, 1e9, 8) == 4


@given(
    left=st.floats(1e9, 1e13),
    interval=st.floats(1e6, 1e13),
    questions=st.integers(1, 10**6),
)
def test_a_price_is_never_below_zero_nor_above_all_of_the_accuracy(left, interval, questions):
    price = sampling_price(
        CURVE,
        left=left,
        interval=interval,
        questions=questions,
        flops_a_sample=1e7,
        max_samples=8,
    )
    assert 0 <= price * interval <= 0.54 + 1e-12


def grown(flops: float, samples: int) -> tuple[float, float]:
    """Votes are worth most in the middle of a training."""
    one = saturating(flops, a=0.5, c=0.3, b=5e-12)
    return one + one * (1 - one) * (1 - 1 / samples), 0.01


@given(
    questions=st.integers(1, 2000),
    each=st.floats(1e7, 1e9),
    spent=st.floats(0, 5e11),
    longer=st.floats(-0.3, 0.6),
)
@settings(deadline=None, max_examples=50)
def test_the_best_way_is_that_of_a_finer_grid(questions, each, spent, longer):
    budget, sizes = 1e12, (1, 2, 3, 5, 8)

    def flops_a_sample(flops: float) -> float:
        return each * (1 + longer * flops / budget)  # answers change as training goes on

    choice = best_way(
        grown,
        budget=budget,
        questions=questions,
        sizes=sizes,
        flops_a_sample=flops_a_sample,
        spent=spent,
    )
    naive = [
        grown(end, size)[0]
        for size in sizes
        for end in np.linspace(spent, budget, 2001)
        if end + questions * size * flops_a_sample(end) <= budget
    ]
    if choice is None:
        assert not naive
        return
    assert choice.best.accuracy >= max(naive, default=0.0) - 1e-3
    assert all(way.flops(questions) <= budget * (1 + 1e-9) for way in choice.ways)
    assert all(way.training_flops >= spent for way in choice.ways)
    assert [way.samples for way in choice.ways] == sorted({way.samples for way in choice.ways})


def test_more_questions_never_leave_more_for_training_one_sample_each():
    found = [
        best_way(
            grown,
            budget=1e12,
            questions=questions,
            sizes=vote_sizes(40),
            flops_a_sample=lambda flops: 1e8,
        )
        for questions in (1, 100, 1000, 5000, 9000)
    ]
    assert found[0].best.samples == 40, "of one question they cost next to nothing"
    ends = [choice.longest.training_flops for choice in found]
    assert ends == sorted(ends, reverse=True)
    samples = [choice.best.samples for choice in found]
    assert samples == sorted(samples, reverse=True), samples
    none = best_way(
        grown, budget=1e12, questions=20_000, sizes=(1, 2), flops_a_sample=lambda flops: 1e8
    )
    assert none is None, "not even one sample each"


def test_the_break_even_is_where_both_take_the_same():
    early, late = Way(2e11, 8, 1e9, 0.6), Way(9e11, 1, 1.1e9, 0.6)
    questions = break_even(early, late)
    assert early.flops(questions) == pytest.approx(late.flops(questions))
    assert early.flops(questions - 1) < late.flops(questions - 1)
    assert early.flops(questions + 1) > late.flops(questions + 1)
    assert break_even(Way(2e11, 1, 1e9, 0.6), late) == math.inf
    assert break_even(late, early) == 0.0
    assert break_even(late, late) == 0.0
