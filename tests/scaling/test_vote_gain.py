"""How answers spread, what more of them are worth, how often a vote is right."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.core.sampling import Outcome
from thrifty.scaling.answer_prior import (
    GRID,
    AnswerPrior,
    fit_prior,
    flat_prior,
    log_partition,
    prior_from,
)
from thrifty.scaling.rightness import fit_rightness
from thrifty.scaling.vote_gain import Rightness, gains, unseen_odds


def only(alpha: float, d: float) -> AnswerPrior:
    """All weight on one component."""
    weights = np.array([1.0 if (a, b) == (alpha, d) else 1e-300 for a, b in GRID])
    return AnswerPrior(weights / weights.sum())


def naive_log_partition(counts: tuple[int, ...], alpha: float, d: float) -> float:
    """Answer by answer: each joins its class, or begins one."""
    total, seen = 0.0, [0] * len(counts)
    n = 0
    for place, count in enumerate(counts):
        for _ in range(count):
            if n:
                classes = sum(s > 0 for s in seen)
                weight = seen[place] - d if seen[place] else alpha + d * classes
                total += math.log(weight / (n + alpha))
            seen[place] += 1
            n += 1
    return total


def naive_gain(counts: list[int], alpha: float, d: float, k: int, s: float, none: float) -> float:
    """Over every sequence of k answers, challenger by challenger, as the docstring defines it."""
    lead = max(range(len(counts)), key=counts.__getitem__)
    n = sum(counts)
    shares = [(count / n) ** s for count in counts]
    found = 0.0

    def walk(now: list[int], left: int, chance: float) -> None:
        nonlocal found
        if not left:
            total = sum(now)
            for b in range(len(now)):
                if now[b] <= now[lead]:
                    continue
                mine, his = (now[b] / total) ** s, (now[lead] / total) ** s
                was = shares[b] if b < len(shares) else 0.0
                rest = sum(shares) - shares[lead] - was + none
                found += chance * (mine - his) / (mine + his + rest)
            return
        total = sum(now) + alpha
        for place in range(len(now)):
            after = now.copy()
            after[place] += 1
            walk(after, left - 1, chance * (now[place] - d) / total)
        walk([*now, 1], left - 1, chance * (alpha + d * len(now)) / total)

    walk(list(counts), k, 1.0)
    return found


@pytest.mark.parametrize("counts", [(1,), (3,), (2, 1), (5, 2, 2, 1), (1, 1, 1, 1), (12, 7, 3)])
def test_the_probability_of_a_partition(counts: tuple[int, ...]) -> None:
    for (alpha, d), found in zip(GRID, log_partition(counts), strict=True):
        assert found == pytest.approx(naive_log_partition(counts, alpha, d), abs=1e-9)


def test_the_probabilities_of_all_partitions_sum_to_one() -> None:
    n = 6
    total = np.zeros(len(GRID))
    for labels in itertools.product(range(n), repeat=n):
        # restricted growth: each class named by its first member
        if all(label <= max(labels[:i], default=-1) + 1 for i, label in enumerate(labels)):
            total += np.exp(log_partition(tuple(sorted(Counter(labels).values()))))
    assert total == pytest.approx(np.ones(len(GRID)))


@pytest.mark.parametrize("counts", [[1], [2, 1], [2, 2], [3, 1, 1]])
@pytest.mark.parametrize(("alpha", "d"), [(0.5, 0.0), (8.0, 0.3)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_gain_is_that_of_every_sequence(
    counts: list[int], alpha: float, d: float, k: int
) -> None:
    found = gains(counts, only(alpha, d), Rightness(1.4, 0.2), (k,))
    assert found[0] == pytest.approx(naive_gain(counts, alpha, d, k, 1.4, 0.2), rel=1e-9, abs=1e-12)


def test_several_looks_at_once_are_each_by_itself() -> None:
    prior = flat_prior()
    looks = (1, 2, 4, 8, 21)
    together = gains([4, 3, 1], prior, Rightness(), looks)
    apart = [gains([4, 3, 1], prior, Rightness(), (k,))[0] for k in looks]
    assert together == pytest.approx(apart)


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=8), k=st.integers(1, 30))
def test_a_gain_is_a_chance_and_grows_with_the_look(counts: list[int], k: int) -> None:
    found = gains(counts, flat_prior(), Rightness(), (k, k + 1, k + 2))
    assert (found >= 0).all()
    assert found[0] <= found[2] + 1e-9
    assert found.max() < 1 + math.log(2 + len(counts))  # a sum over challengers, not one chance


def test_a_settled_vote_gains_nothing_and_an_open_one_much() -> None:
    prior, look = flat_prior(), (8,)
    settled = gains([30, 1], prior, Rightness(), look)[0]
    tied = gains([2, 2], prior, Rightness(), look)[0]
    hopeless = gains([1] * 12, prior, Rightness(), look)[0]
    assert settled < 1e-6
    assert tied > 2 * hopeless > 0


def test_two_more_can_turn_what_one_cannot() -> None:
    one, two = gains([2, 1], flat_prior(), Rightness(), (1, 2))
    assert one == 0 < two


def test_how_answers_spread_is_found_again() -> None:
    rng = np.random.default_rng(0)
    wanted = {(0.125, 0.0): 0.7, (8.0, 0.0): 0.3}
    tallies = []
    for alpha, d in wanted:
        for _ in range(round(600 * wanted[alpha, d])):
            counts: list[int] = []
            for _ in range(20):
                weights = np.array([c - d for c in counts] + [alpha + d * len(counts)])
                place = rng.choice(len(weights), p=weights / weights.sum())
                if place == len(counts):
                    counts.append(1)
                else:
                    counts[place] += 1
            tallies.append(counts)
    fitted = fit_prior(tallies)
    easy = sum(w for (alpha, _), w in zip(GRID, fitted.weights, strict=True) if alpha <= 1)
    assert easy == pytest.approx(0.7, abs=0.05)
    logs = np.array([log_partition(tuple(sorted(c))) for c in tallies])
    likelihoods = [float(np.log(np.exp(logs) @ p.weights).sum()) for p in (flat_prior(), fitted)]
    assert likelihoods[1] > likelihoods[0]


def test_a_prior_goes_through_a_file_and_nothing_else_does() -> None:
    fitted = fit_prior([(3, 1), (4,), (1, 1, 1)])
    assert prior_from(fitted.to_list()).weights == pytest.approx(fitted.weights, abs=1e-5)
    with pytest.raises(ValueError, match="fit the policy anew"):
        prior_from([1.0, 2.0])


def test_questions_of_one_answer_tell_nothing() -> None:
    assert fit_prior([(1,), (1,)]).weights == pytest.approx(flat_prior().weights)


def outcome(counts: tuple[int, ...], right: int | None) -> Outcome:
    answers = tuple(str(i) for i, count in enumerate(counts) for _ in range(count))
    correct = tuple(float(answer == str(right)) for answer in answers)
    return Outcome(id="", model="m", answers=answers, correct=correct)


@pytest.mark.parametrize(("sharpness", "none"), [(0.5, 0.3), (2.0, 0.05)])
def test_how_often_a_vote_is_right_is_found_again(sharpness: float, none: float) -> None:
    rng = np.random.default_rng(1)
    truth, outcomes = Rightness(sharpness, none), []
    for _ in range(1500):
        counts = tuple(int(c) for c in rng.multinomial(10, rng.dirichlet([1.0] * 4)) if c)
        chances = truth.of(counts, 0.0)
        place = int(rng.choice(len(counts) + 1, p=[*chances, 1 - chances.sum()]))
        outcomes.append(outcome(counts, place if place < len(counts) else None))
    found = fit_rightness(outcomes)
    assert found["sharpness"] == pytest.approx(sharpness, rel=0.2)
    assert found["none"] == pytest.approx(none, rel=0.3)
    assert found["num_questions"] == 1500


def test_few_questions_change_little() -> None:
    assert 0.6 < fit_rightness([outcome((3, 1), 0)])["sharpness"] < 1.6
    assert fit_rightness([]) == {"num_questions": 0}
    unread = Outcome(id="", model="m", answers=(None,), correct=(0.0,))
    assert fit_rightness([unread]) == {"num_questions": 0}


def test_chances_sum_to_less_than_one() -> None:
    counts = [5, 2, 1]
    chances = Rightness().of(counts, unseen_odds(counts, flat_prior().posterior(counts)))
    assert 0 < chances.sum() < 1
    assert list(chances) == sorted(chances, reverse=True)
