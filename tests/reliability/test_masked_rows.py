"""Rows that have nothing to learn are counted, and refused past a share."""

from __future__ import annotations

import pytest

from tests.conftest import sentences, write_jsonl
from tests.runs import planned
from thrifty.data.store import open_store


def pool_with_masked(folder, count: int):
    """Of 100 rows so many have a prompt that fills 64 tokens."""
    rows = sentences("sums", 100 - count, 1)
    rows += [{"prompt": "say one two three " * 40, "completion": " yes."}] * count
    return write_jsonl(folder / "pool.jsonl", rows)


def test_a_few_are_set_aside_and_counted(tiny_model, tiny_data, tmp_path):
    data = {**tiny_data, "pool": pool_with_masked(tmp_path, 20)}
    planned(tmp_path / "run", tiny_model, data)
    store = open_store(tmp_path / "run" / "pool")
    assert store.manifest.num_bad == {"prompt_too_long": 20}
    assert len(store) == 80


def test_too_many_are_refused_before_anything_is_planned(tiny_model, tiny_data, tmp_path):
    data = {**tiny_data, "pool": pool_with_masked(tmp_path, 30)}
    with pytest.raises(
        ValueError, match="30 of 100 rows of the pool have nothing to learn"
    ) as told:
        planned(tmp_path / "run", tiny_model, data)
    assert "prompt_too_long 30" in str(told.value)
    assert "--set pool.most_masked" in str(told.value)
    assert not (tmp_path / "run").exists()


def test_the_share_may_be_raised_and_is_checked(tiny_model, tiny_data, tmp_path):
    data = {**tiny_data, "pool": pool_with_masked(tmp_path, 30)}
    plan = planned(tmp_path / "run", tiny_model, data, fixed={"pool.most_masked": 0.5})
    assert plan.pool.most_masked == 0.5
    with pytest.raises(ValueError, match="most_masked is a share"):
        planned(tmp_path / "other", tiny_model, data, fixed={"pool.most_masked": 2})


def test_a_pool_of_nothing_else_is_refused(tiny_model, tiny_data, tmp_path):
    data = {**tiny_data, "pool": pool_with_masked(tmp_path, 100)}
    with pytest.raises(ValueError, match="rows"):
        planned(tmp_path / "run", tiny_model, data, fixed={"pool.most_masked": 1})
