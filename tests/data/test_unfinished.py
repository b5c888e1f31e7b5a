"""A plan that was killed half-way: the next one tokenises what is left, and comes to the same."""

from __future__ import annotations

from itertools import islice

import pytest
from tests.data.test_store import build, make_rows

from thrifty.data import store as store_module
from thrifty.data.pool import BadRow, Row
from thrifty.data.store import open_store
from thrifty.data.unfinished import PROGRESS, known_rows, num_known, set_aside


@pytest.fixture
def killed(tmp_path, tokenizer, monkeypatch):
    """A build that came to row 96, its whole shards of 16 rows, and what the whole one makes."""
    monkeypatch.setattr(store_module, "BATCH_ROWS", 8)

    def rows():
        yield from islice(make_rows(100), 96)
        raise KeyboardInterrupt

    whole = build(tmp_path / "whole", tokenizer)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        build(folder, tokenizer, rows=rows(), key="k")
    return folder, whole


@pytest.fixture
def tokenised(monkeypatch):
    """Ids of the rows that are tokenised from now on."""
    seen, whole = [], store_module.tokenize_rows

    def watched(rows, *args):
        seen.extend(row.id for row in rows)
        return whole(rows, *args)

    monkeypatch.setattr(store_module, "tokenize_rows", watched)
    return seen


def test_what_is_left_is_tokenised_and_the_store_is_the_same(
    killed, tokenizer, tmp_path, tokenised
):
    folder, whole = killed
    before = [known.id for known in known_rows(folder, "k")]
    assert len(before) == num_known(folder, "k") >= 48
    manifest = build(tmp_path / "again", tokenizer, key="k", before=folder)
    assert manifest == whole
    assert not (tmp_path / "again" / PROGRESS).exists()
    # Bad ones of before are tried again: nobody noted what they came to.
    valid = {row.id for row in open_store(tmp_path / "whole").whole().rows}
    assert set(tokenised) & valid == valid - set(before)


def test_another_key_takes_nothing_over(killed, tokenizer, tmp_path, tokenised):
    folder, whole = killed
    assert num_known(folder, "other") == 0
    assert build(tmp_path / "again", tokenizer, key="other", before=folder) == whole
    rows = [row.id for row in make_rows(100) if isinstance(row, Row)]
    assert tokenised == rows


def _torn(folder):
    notes = folder / PROGRESS
    notes.write_bytes(notes.read_bytes()[:-20])


def _damaged(folder):
    shard = folder / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-50] + b"x" * 50)


def _missing(folder):
    (folder / "shard-00001.parquet").unlink()


@pytest.mark.parametrize("hurt", [_torn, _damaged, _missing])
def test_what_is_not_whole_ends_what_is_taken_over(killed, tokenizer, tmp_path, hurt):
    folder, whole = killed
    before = [known.id for known in known_rows(folder, "k")]
    hurt(folder)
    after = [known.id for known in known_rows(folder, "k")]
    assert after == before[: len(after)]
    assert len(after) < len(before)
    assert build(tmp_path / "again", tokenizer, key="k", before=folder) == whole


def test_rows_that_changed_under_the_same_key_are_tokenised(killed, tokenizer, tmp_path):
    """A key that lied would not matter."""
    folder, whole = killed
    rows = [
        row
        if isinstance(row, BadRow) or row.id != 9
        else Row(9, row.file, row.number, row.kind, {**row.content, "completion": "no"}, {})
        for row in make_rows(100)
    ]
    manifest = build(tmp_path / "again", tokenizer, rows=rows, key="k", before=folder)
    assert manifest.content_sha256 != whole.content_sha256
    assert manifest == build(tmp_path / "plain", tokenizer, rows=rows)


def test_of_two_killed_plans_the_one_that_came_further_is_kept(killed, tmp_path, tokenizer):
    folder, _ = killed
    aside = tmp_path / "aside"
    set_aside(folder, aside)
    assert not folder.exists()
    count = num_known(aside, "k")

    def few():
        yield from islice(make_rows(100), 40)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, tokenizer, rows=few(), key="k")
    set_aside(folder, aside)
    assert num_known(aside, "k") == count
    with pytest.raises(KeyboardInterrupt):
        build(folder, tokenizer, rows=few(), key="other")
    set_aside(folder, aside)  # what is asked for now
    assert 0 < num_known(aside, "other") < count
