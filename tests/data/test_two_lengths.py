"""Rows of two packs: short documents in the first, long ones in the second, each in its epochs."""

from __future__ import annotations

import numpy as np
import pytest

from thrifty.data.packing import IGNORED, shuffled
from thrifty.data.tokens import Tokens
from thrifty.data.two_lengths import TwoLengths, cut_at, num_labels

LENGTHS = [3, 30, 8, 5, 40, 25, 7, 2, 33, 6]


def examples_of(lengths):
    return [
        Tokens(np.full(length, row + 1, dtype=np.int32), np.ones(length, dtype=bool))
        for row, length in enumerate(lengths)
    ]


def made(lengths=LENGTHS, short=8, sequence=48, num_items=12):
    return TwoLengths(
        examples_of(lengths),
        short,
        sequence,
        num_items=num_items,
        order=lambda epoch: shuffled(len(lengths), 0, epoch),
    )


def documents(column):
    """Lengths of the documents of a pack, by their positions; padding is one too."""
    starts = np.flatnonzero(column == 0).tolist()
    return np.diff([*starts, len(column)]).tolist()


def test_short_documents_come_first_and_long_ones_after():
    for item in (made()[number] for number in range(12)):
        short, other = cut_at(8, {name: column[None] for name, column in item.items()})
        assert short["input_ids"].shape == (1, 8)
        assert other["input_ids"].shape == (1, 48)
        assert max(documents(short["position_ids"][0].numpy())) <= 8
        assert set(other["input_ids"][0].tolist()) <= {0, 2, 5, 6, 9}
        assert int(num_labels(other)) == int((other["labels"] != IGNORED).sum()) > 0


def test_each_kind_is_gone_through_before_it_comes_again():
    """31 tokens of 6 short documents are at least 4 packs of 8, 128 of 4 long ones at least 3."""
    packs = made()
    for number in range(12):
        packs[number]
    seen = [
        sorted(row for item in range(each.epoch_starts[1]) for row in each.members(item))
        for each in packs._packs
    ]
    assert seen == [[0, 2, 3, 6, 7, 9], [1, 4, 5, 8]]


def test_where_all_are_short_the_long_packs_have_all():
    packs = made([3, 8, 5, 2], num_items=3)
    item = packs[0]
    assert int((item["labels"][8:] != IGNORED).sum()) == 3 + 8 + 5 + 2 - 4


def test_where_none_is_short_it_says_so():
    with pytest.raises(ValueError, match=r"none of 2 rows has at most 8 tokens.*\nhint: .*short"):
        made([20, 30])
