"""Pickers beyond the contract: each against what its paper says, or a slow version."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from thrifty.core.contracts import Candidates
from thrifty.core.ordering import even_draw
from thrifty.core.resolve import resolve
from thrifty.signals.submodular import lazy_greedy


class Vectors:
    def __init__(self, vectors):
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def vectors(self, ids):
        return self._vectors[ids].astype(np.float32)

    def texts(self):
        return iter(())


def rows_of(scores, tokens=None, vectors=None):
    scores = np.asarray(scores, dtype=np.float32)
    scores = scores[:, None] if scores.ndim == 1 else scores
    count, targets = scores.shape
    return Candidates(
        ids=np.arange(count),
        scores=scores,
        num_tokens=np.full(count, 10) if tokens is None else np.asarray(tokens),
        fingerprints=np.zeros(count, dtype="V16"),
        targets=tuple(f"t{k}" for k in range(targets)),
        weights=(1.0,) * targets,
        look=None if vectors is None else Vectors(np.asarray(vectors, dtype=np.float64)),
    )


def pick(spec, rows, budget, seed=0):
    return resolve("picker", spec).pick(rows, budget, seed).ids.tolist()


def test_band_takes_what_is_nearest_to_a_quantile():
    rows = rows_of(np.random.default_rng(0).permutation(101).astype(float))
    chosen = rows.scores[pick("band", rows, 50), 0]
    assert sorted(chosen) == [48, 49, 50, 51, 52]
    top = rows.scores[pick({"band": {"center": 1.0}}, rows, 30), 0]
    assert top.tolist() == [100, 99, 98]


def test_threshold_stops_at_a_score_or_a_share():
    rows = rows_of([5.0, 1.0, 3.0, np.nan, 4.0])
    assert pick({"threshold": {"least": "3"}}, rows, 1e9) == [0, 4, 2]
    assert pick({"threshold": {"quantile": 0.5}}, rows, 1e9) == [0, 4]
    assert pick({"threshold": {"least": "9"}}, rows, 1e9) == []
    with pytest.raises(ValueError, match="least must be a number, not 'high'"):
        resolve("picker", {"threshold": {"least": "high"}})


def test_round_robin_gives_each_target_a_row_in_turn():
    rows = rows_of([[9, 0], [8, 1], [7, 2], [0, 9], [1, 8]])
    assert pick("round_robin", rows, 40) == [0, 3, 1, 4]


def test_coverage_cuts_the_hardest_and_draws_from_every_stratum():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.uniform(0, 1, 900), rng.uniform(9, 10, 100)])
    rows = rows_of(scores)
    chosen = np.array(pick({"coverage": {"cut": 0.05, "strata": 5}}, rows, 400))
    hardest = np.argsort(-scores)[:50]
    assert not set(chosen.tolist()) & set(hardest.tolist())
    # The range of the rest has two strata with rows in it: each gets half.
    assert (scores[chosen] > 5).sum() == 20
    assert (scores[chosen] < 5).sum() == 20


def test_clusters_are_drawn_from_evenly_the_best_first():
    rng = np.random.default_rng(2)
    centres = np.array([[10.0, 0, 0]] * 80 + [[0, 10.0, 0]] * 15 + [[0, 0, 10.0]] * 5)
    rows = rows_of(rng.uniform(size=100), vectors=centres + rng.normal(0, 0.1, (100, 3)))
    chosen = np.array(pick({"clusters": {"clusters": 3}}, rows, 240))
    first, second, third = (chosen < 80).sum(), ((chosen >= 80) & (chosen < 95)).sum(), None
    third = (chosen >= 95).sum()
    assert (first, second, third) == (10, 9, 5) or (first, second, third) == (9, 10, 5)
    best = np.argsort(-rows.scores[:80, 0])[:first]
    assert set(chosen[chosen < 80].tolist()) == set(best.tolist())


def test_gumbel_draws_in_proportion():
    """Over many seeds the first draw has the softmax's probabilities."""
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    rows = rows_of(np.log(probabilities) * 2.0)
    picker = {"gumbel": {"temperature": 2.0}}
    firsts = np.bincount([pick(picker, rows, 10, seed)[0] for seed in range(1500)], minlength=4)
    error = np.sqrt(probabilities * (1 - probabilities) / 1500)
    assert (np.abs(firsts / 1500 - probabilities) < 4 * error).all()


def value(likeness, chosen):
    return likeness[:, list(chosen)].max(axis=1).sum() if chosen else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_is_greedy_and_near_the_best(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(9, 3))
    likeness = np.maximum(points @ points.T, 0)
    tokens = np.ones(9)
    chosen: list[int] = []
    for _ in range(3):
        gains = [-1 if k in chosen else value(likeness, [*chosen, k]) for k in range(9)]
        chosen.append(int(np.argmax(gains)))
    got = lazy_greedy(likeness, tokens, 3).tolist()
    assert value(likeness, got) == pytest.approx(value(likeness, chosen))
    best = max(value(likeness, c) for c in itertools.combinations(range(9), 3))
    assert value(likeness, got) >= (1 - 1 / np.e) * best


def test_facility_location_takes_one_of_each_kind_first():
    vectors = np.repeat(np.eye(4), [6, 5, 4, 3], axis=0)
    rows = rows_of(np.zeros(18), vectors=vectors)
    chosen = pick({"facility_location": {"balance": 0.0}}, rows, 40)
    assert {int(np.argmax(vectors[row])) for row in chosen} == {0, 1, 2, 3}


def test_an_even_draw_never_starves_a_group():
    groups = np.repeat([0, 1, 2], [50, 3, 20])
    order = even_draw(groups, np.full(73, 10), np.arange(73), 300, 0)
    assert np.bincount(groups[order]).tolist() == [14, 3, 13]
    assert {0, 1, 2} == set(groups[order[:3]].tolist())


def slow_bids(scores, tokens, budget):
    """Places in the order taken: every row left is looked at in every turn."""
    scores = np.asarray(scores, dtype=np.float64)
    influence = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    chosen: list[int] = []
    while True:
        used = sum(tokens[row] for row in chosen)
        left = [
            row for row in range(len(scores)) if row not in chosen and used + tokens[row] <= budget
        ]
        if not left:
            return chosen
        mean = influence[chosen].mean(axis=0) if chosen else 0.0
        chosen.append(max(left, key=lambda row: (influence[row] - mean).max()))


@pytest.mark.parametrize("targets", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_bids_is_the_greedy_of_its_paper(targets, seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(60, targets)).astype(np.float32) * 10.0 ** np.arange(targets)
    tokens = rng.integers(1, 40, 60)
    found = pick("bids", rows_of(scores, tokens=tokens), 400)
    assert found == slow_bids(np.float32(scores), tokens.tolist(), 400)


def test_bids_does_not_let_the_target_with_the_largest_scores_take_all():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 0.1, (300, 3))
    scores[:200, 0] += rng.uniform(50, 90, 200)  # many rows, large scores
    scores[200:250, 1] += rng.uniform(2, 3, 50)
    scores[250:, 2] += rng.uniform(0.5, 1, 50)
    chosen = np.array(pick("bids", rows_of(scores), 600))
    served = np.bincount(scores[chosen].argmax(axis=1), minlength=3)
    assert served.sum() == 60
    assert (served >= 12).all()
    by_sum = np.argsort(-scores.sum(axis=1))[:60]
    assert (by_sum < 200).all()


def test_bids_looks_at_a_row_only_for_targets_that_have_a_score_for_it():
    scores = [[5.0, np.nan], [4.0, 1.0], [np.nan, np.nan], [3.0, 2.0]]
    chosen = pick("bids", rows_of(scores), 1e9)
    assert sorted(chosen) == [0, 1, 3]
    assert chosen[0] == 0


def test_the_best_target_alone_may_count():
    scores = np.array([[0.9, 0.0], [0.5, 0.5], [0.0, 0.8], [0.4, 0.4]])
    rows = rows_of(np.zeros(4), vectors=np.eye(4))
    rows = replace(rows, scores=scores.astype(np.float32), targets=("a", "b"), weights=(1.0, 1.0))
    assert set(pick({"top_k": {"by": "max"}}, rows, 20)) == {0, 2}
    assert 1 in pick("top_k", rows, 20)
