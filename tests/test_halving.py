"""Successive halving: what it spends, whom it keeps, and that it finds the best."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.scaling.halving import rungs, survivors


@dataclass
class Seen:
    mean: float
    stderr: float


@given(st.integers(1, 200), st.floats(1e-3, 1e25), st.floats(1.01, 10))
def test_the_total_is_never_exceeded(num, total, eta):
    found = rungs(num, total, eta)
    assert sum(r.num_candidates * r.budget for r in found) <= total
    assert [r.num_candidates for r in found] == sorted({r.num_candidates for r in found})[::-1]
    assert found[-1].num_candidates > 1 if num > 1 else not found
    if num > 1:
        assert math.isclose(sum(r.num_candidates * r.budget for r in found), total, rel_tol=1e-9)


def test_each_rung_spends_the_same_on_fewer():
    assert [r.num_candidates for r in rungs(8, 24.0)] == [8, 4, 2]
    assert [round(r.budget, 6) for r in rungs(8, 24.0)] == [1.0, 2.0, 4.0]
    assert [r.num_candidates for r in rungs(5, 1.0)] == [5, 3, 2]


@pytest.mark.parametrize("bad", [(0, 1.0, 2.0), (3, -1.0, 2.0), (3, math.nan, 2.0), (3, 1.0, 1.0)])
def test_what_cannot_be_halved_is_refused(bad):
    with pytest.raises(ValueError, match="hint"):
        rungs(*bad)


def test_the_leader_goes_on_and_ties_go_to_the_first_named():
    tied = [Seen(1.0, 0.5), Seen(1.1, 0.5), Seen(1.2, 0.5), Seen(1.3, 0.5)]
    assert survivors(tied, 2) == (0, 3)
    assert survivors(tied, 1) == (0,)  # of the last place the leader has no right
    clear = [Seen(1.0, 0.01), Seen(1.1, 0.01), Seen(1.2, 0.01), Seen(1.3, 0.01)]
    assert survivors(clear, 1) == (3,)


def test_nothing_is_spent_on_who_is_surely_worse_or_no_different():
    seen = [Seen(0.0, 0.01), Seen(1.0, 0.3), Seen(1.2, 0.3)]
    assert survivors(seen, 3) == (1, 2)
    alike = [Seen(1.0, 0.001), Seen(1.0005, 0.001)]
    assert survivors(alike, 2) == (0, 1)
    assert survivors(alike, 2, indifferent=0.01) == (0,)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 2)), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_who_goes_on_is_few_enough_and_not_surely_worse(pairs, keep):
    seen = [Seen(*pair) for pair in pairs]
    found = survivors(seen, keep)
    best = max(seen, key=lambda each: each.mean)
    assert 1 <= len(found) <= keep
    assert list(found) == sorted(set(found))
    for place in found:
        noise = math.hypot(seen[place].stderr, best.stderr)
        assert best.mean - seen[place].mean <= noise


def test_the_best_of_eight_noisy_curves_is_found_at_under_half_of_what_all_would_take():
    """Losses 2 + a C^-0.3 + noise / sqrt(C): the known optimum is the smallest a."""
    right, trials = 0, 200
    for seed in range(trials):
        rng = random.Random(seed)
        sizes = [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 0.9, 0.6]
        rng.shuffle(sizes)
        left, spent, total = list(range(8)), dict.fromkeys(range(8), 0.0), 240.0
        schedule = rungs(8, total)
        for rung, keep in zip(schedule, (4, 2, 1), strict=True):
            seen = []
            for each in left:
                spent[each] += rung.budget
                noise = 0.1 / math.sqrt(spent[each])
                loss = 2 + sizes[each] * spent[each] ** -0.3 + rng.gauss(0, noise)
                seen.append(Seen(-loss, noise))
            left = [left[place] for place in survivors(seen, keep)]
        assert sum(spent.values()) <= total
        right += sizes[left[0]] == 0.6
    most = max(spent.values())
    assert total < 8 * most / 2  # all to the end would have taken more than twice as much
    assert right >= 0.9 * trials
