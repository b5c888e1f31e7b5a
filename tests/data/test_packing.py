"""Packs: every example once, none over the limit, the same ones after a restart."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.data.packing import (
    IGNORED,
    PackedDataset,
    pack,
    pack_in_order,
    padded_batches,
    shuffled,
)
from thrifty.data.tokens import Tokens

LENGTHS = st.lists(st.integers(1, 64), max_size=120)


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """Free tokens per pack, searched from end to end."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(free) if left >= length]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= length
        else:
            free.append(capacity - length)
    return len(free)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(64, 200))
def test_every_example_once_and_no_pack_over(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= capacity for members in packs)
    assert packs == pack(np.array(lengths, dtype=np.int32), capacity)
    assert len(packs) == naive_best_fit(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(64, 500))
def test_padded_batches(lengths: list[int], max_tokens: int) -> None:
    batches = padded_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)
    longest = [lengths[batch[0]] for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_lengths_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"11 tokens does not fit 10\nhint"):
        pack([3, 11], 10)
    with pytest.raises(ValueError, match="no tokens"):
        pack([3, 0], 10)
    with pytest.raises(ValueError, match="does not fit"):
        padded_batches([11], 10)
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_a_hundred_thousand_lengths_in_a_moment() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 100_000)
    start = time.perf_counter()
    packs = pack(lengths, 4096)
    assert time.perf_counter() - start < 5
    assert lengths.sum() / (len(packs) * 4096) > 0.999


def examples(num: int, longest: int = 40, seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        size = int(rng.integers(2, longest))
        mask = np.arange(size) >= size // 2
        made.append(Tokens(np.arange(size, dtype=np.int32) + 100 * (i + 1), mask))
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(40, 90), st.integers(1, 40), st.integers(0, 5))
def test_items_hold_whole_documents(num: int, sequence: int, window: int, seed: int) -> None:
    docs = examples(num, seed=seed)
    data = PackedDataset(docs, sequence, seed=seed, window=window, pad_token_id=7, num_epochs=2)
    seen: list[int] = []
    for item in range(len(data)):
        pack_ = {name: value.numpy() for name, value in data[item].items()}
        assert all(value.shape == (sequence,) for value in pack_.values())
        at = 0
        for i in data.members(item):
            size = len(docs[i].input_ids)
            place = slice(at, at + size)
            assert pack_["input_ids"][place].tolist() == docs[i].input_ids.tolist()
            assert pack_["position_ids"][place].tolist() == list(range(size))
            counted = docs[i].loss_mask.copy()
            counted[0] = False
            assert pack_["labels"][place][counted].tolist() == docs[i].input_ids[counted].tolist()
            assert (pack_["labels"][place][~counted] == IGNORED).all()
            seen.append(i)
            at += size
        assert (pack_["input_ids"][at:] == 7).all()
        assert (pack_["labels"][at:] == IGNORED).all()
        assert pack_["position_ids"][at:].tolist() == list(range(sequence - at))
    assert sorted(seen) == sorted([*range(num), *range(num)])
    assert data.num_tokens == 2 * sum(len(doc.input_ids) for doc in docs)


def test_the_same_packs_after_a_restart_and_others_each_epoch() -> None:
    docs = examples(200)
    once, again = (PackedDataset(docs, 64, seed=3, num_epochs=3) for _ in range(2))
    packs = [once.members(i) for i in range(len(once))]
    assert packs == [again.members(i) for i in range(len(again))]
    first, second, third = once.epoch_starts
    assert packs[first:second] != packs[second:third]
    # the packs of an epoch do not depend on how many epochs there are
    alone = PackedDataset(docs, 64, seed=3)
    assert packs[:second] == [alone.members(i) for i in range(len(alone))]
    assert packs[:second] != [
        PackedDataset(docs, 64, seed=4).members(i) for i in range(second)
    ]  # fmt: skip
    assert shuffled(5, 0, 0).tolist() == [2, 4, 3, 0, 1]  # the same on every machine


def test_a_given_order_survives_up_to_a_window() -> None:
    docs = examples(300)
    lengths = np.array([len(doc.input_ids) for doc in docs])
    order = list(range(299, -1, -1))[:250]  # a selection, best first
    data = PackedDataset(docs, 128, order=lambda epoch: order, window=50)
    flat = [i for item in range(len(data)) for i in data.members(item)]
    assert sorted(flat) == sorted(order)
    for start in range(0, 250, 50):
        assert sorted(flat[start : start + 50]) == sorted(order[start : start + 50])
    packs = pack_in_order(lengths, order, 128, 1)  # a window of one: the order itself
    assert packs == [[i] for i in order]
    for item in range(len(data)):  # within a pack, too
        places = [order.index(i) for i in data.members(item)]
        assert places == sorted(places)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="window"):
        PackedDataset(examples(2), 64, window=0)
    with pytest.raises(ValueError, match="does not fit 8"):
        PackedDataset(examples(50), 8)


def test_the_data_floor_imports_no_torch() -> None:
    names = "pool tokens packing packed_attention store splits shard chat formats readers sources"
    code = (
        f"import sys, importlib\nfor name in {names.split()!r}:\n"
        "    importlib.import_module('thrifty.data.' + name)\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _of_length(size):
    return Tokens(np.arange(size, dtype=np.int32), np.ones(size, dtype=bool))


def _items(dataset, places):
    return [dataset.members(place) for place in places]


def test_what_follows_is_drawn_anew_from_the_first_item_that_nobody_has_read():
    """And a dataset that is told where that was gives the same items."""
    first = [_of_length(n) for n in (4, 4, 4, 4, 4, 4)]
    both = [*first, *(_of_length(n) for n in (3, 3, 3, 3))]

    def order(epoch):
        return [0, 1, 2, 3, 4, 5] if epoch == 0 else [6, 7, 8, 9]

    dataset = PackedDataset(first, 4, num_items=12, order=order)
    for place in range(3):
        dataset[place]
    assert dataset.begin_anew(both, dataset.num_read) == [3, 4, 5]
    assert _items(dataset, range(8)) == [[0], [1], [2], [6], [7], [8], [9], [6]]
    again = PackedDataset(first, 4, num_items=12, order=order)
    again.restore(both, [3])
    assert _items(again, (7, 0, 3)) == [[6], [0], [6]]
    assert again.epoch_starts == [0, 3, 7]
