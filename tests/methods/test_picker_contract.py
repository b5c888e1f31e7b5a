"""What every picker and every filter must fulfil, run over all there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.contracts import Candidates, Held
from thrifty.core.resolve import all_names, resolve

PICKERS = all_names("picker")
FILTERS = all_names("filter")


class Look:
    """A text and a vector of each id, some of them near one another."""

    def texts(self):
        for start in range(0, 40, 16):
            ids = np.arange(start, min(start + 16, 40))
            yield ids, [f"row {i % 23} of many others that say the same" for i in ids.tolist()]

    def vectors(self, ids):
        rng = np.random.default_rng(0)
        found = rng.normal(size=(40, 6))[ids % 31].astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@st.composite
def candidates(draw, min_rows=0):
    count = draw(st.integers(min_rows, 40))
    targets = draw(st.integers(1, 3))
    score = st.one_of(st.sampled_from([0.0, 1.0, float("nan")]), st.floats(-5, 5, width=32))
    scores = draw(st.lists(score, min_size=count * targets, max_size=count * targets))
    ids = draw(st.permutations(range(count)))
    return Candidates(
        ids=np.asarray(ids, dtype=np.int64),
        scores=np.asarray(scores, dtype=np.float32).reshape(count, targets),
        num_tokens=np.asarray(
            draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)), dtype=np.int64
        ),
        fingerprints=np.array(
            [np.void(bytes([draw(st.integers(0, 9))]) * 16) for _ in range(count)], dtype="V16"
        ),
        targets=tuple(f"t{i}" for i in range(targets)),
        weights=tuple(1.0 + i for i in range(targets)),
        look=Look(),
    )


def tokens_of(rows, picked):
    place = {row: i for i, row in enumerate(rows.ids.tolist())}
    return sum(int(rows.num_tokens[place[row]]) for row in picked.ids.tolist())


@pytest.mark.parametrize("name", PICKERS)
@settings(max_examples=25, deadline=None)
@given(rows=candidates(), budget=st.integers(0, 600), seed=st.integers(0, 3))
def test_within_the_budget_once_each_and_repeatable(name, rows, budget, seed):
    picker = resolve("picker", name)
    picked = picker.pick(rows, budget, seed)
    ids = picked.ids.tolist()
    assert len(set(ids)) == len(ids)
    assert set(ids) <= set(rows.ids.tolist())
    assert len(picked.weights) == len(ids)
    assert tokens_of(rows, picked) <= budget
    assert picker.pick(rows, budget, seed).ids.tolist() == ids
    unreached = {int(i) for i, s in zip(rows.ids, rows.scores, strict=True) if np.isnan(s).all()}
    assert not unreached & set(ids), "what was never scored is not picked"


@pytest.mark.parametrize("name", PICKERS)
@settings(max_examples=20, deadline=None)
@given(rows=candidates(min_rows=1), seed=st.integers(0, 3), data=st.data())
def test_the_order_of_the_candidates_does_not_matter(name, rows, seed, data):
    picker = resolve("picker", name)
    shuffled = rows.where(np.asarray(data.draw(st.permutations(range(len(rows))))))
    ids = picker.pick(rows, 200, seed).ids.tolist()
    assert picker.pick(shuffled, 200, seed).ids.tolist() == ids


@pytest.mark.parametrize("name", PICKERS)
def test_takes_everything_where_the_budget_allows(name):
    rows = Candidates(
        ids=np.arange(5),
        scores=np.arange(5, dtype=np.float32)[:, None],
        num_tokens=np.full(5, 7),
        fingerprints=np.array([np.void(bytes([i]) * 16) for i in range(5)], dtype="V16"),
        targets=("t",),
        weights=(1.0,),
        look=Look(),
    )
    assert sorted(resolve("picker", name).pick(rows, float("inf"), 0).ids.tolist()) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_top_k_takes_the_best_first():
    rows = Candidates(
        ids=np.arange(5),
        scores=np.array([[1.0], [5.0], [np.nan], [3.0], [4.0]], dtype=np.float32),
        num_tokens=np.array([7, 7, 7, 7, 7]),
        fingerprints=np.zeros(5, dtype="V16"),
        targets=("t",),
        weights=(1.0,),
    )
    assert resolve("picker", "top_k").pick(rows, 21, 0).ids.tolist() == [1, 4, 3]


def test_balanced_gives_each_target_its_share():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 2)).astype(np.float32)
    scores[:200, 0] += 10
    scores[200:, 1] += 1  # on a smaller scale, which must not matter
    rows = Candidates(
        ids=np.arange(400),
        scores=scores,
        num_tokens=np.full(400, 10),
        fingerprints=np.zeros(400, dtype="V16"),
        targets=("a", "b"),
        weights=(1.0, 3.0),
    )
    picked = resolve("picker", "balanced").pick(rows, 1000, 0).ids
    assert 20 <= (picked < 200).sum() <= 45


@pytest.mark.parametrize("name", FILTERS)
@settings(max_examples=25, deadline=None)
@given(rows=candidates())
def test_filters_name_a_reason_for_every_row_they_drop(name, rows):
    held = Held({"dev rows of t": frozenset({bytes([3]) * 16})})
    dropped = resolve("filter", name).drop(rows, held)
    assert set(dropped) <= set(rows.ids.tolist())
    assert all(isinstance(reason, str) and reason for reason in dropped.values())


@settings(max_examples=60, deadline=None)
@given(rows=candidates())
def test_of_duplicates_the_best_scored_survives(rows):
    dropped = resolve("filter", "duplicates").drop(rows, Held({}))
    kept = rows.where(~np.isin(rows.ids, list(dropped)))
    prints = [bytes(p) for p in kept.fingerprints]
    assert len(set(prints)) == len(prints) == len({bytes(p) for p in rows.fingerprints})
    best = np.nan_to_num(rows.scores, nan=-np.inf).max(axis=1)
    for survivor in kept.ids.tolist():
        place = rows.ids.tolist().index(survivor)
        same = [i for i, p in enumerate(rows.fingerprints) if p == rows.fingerprints[place]]
        assert best[place] == max(best[i] for i in same)


def test_overlap_drops_what_stands_in_dev_or_test():
    rows = Candidates(
        ids=np.array([7, 8]),
        scores=np.zeros((2, 1), dtype=np.float32),
        num_tokens=np.array([1, 1]),
        fingerprints=np.array([np.void(b"a" * 16), np.void(b"b" * 16)], dtype="V16"),
        targets=("t",),
        weights=(1.0,),
    )
    held = Held({"dev rows of t": frozenset({b"b" * 16})})
    assert resolve("filter", "overlap").drop(rows, held) == {8: "also in dev rows of t"}
