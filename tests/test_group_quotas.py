"""Shares of the tokens for groups of the pool, with any picker."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import write_jsonl
from tests.runs import planned, silent
from thrifty import stages
from thrifty.core.contracts import Candidates
from thrifty.core.resolve import resolve
from thrifty.group_quotas import pick_by_group
from thrifty.run_folder import RunFolder

LABELS = np.repeat(["law", "math", "news"], [10, 50, 40])


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return Candidates(
        ids=np.arange(100),
        scores=rng.normal(size=(100, 1)).astype(np.float32),
        num_tokens=np.full(100, 10),
        fingerprints=np.zeros(100, dtype="V16"),
        targets=("t",),
        weights=(1.0,),
    )


def shares(rows, quotas, max_tokens, picker="top_k"):
    picked = pick_by_group(resolve("picker", picker), rows, LABELS, quotas, max_tokens, 0)
    assert len(set(picked.ids.tolist())) == len(picked.ids)
    counts = {v: int((LABELS[picked.ids] == v).sum()) for v in ("law", "math", "news")}
    return counts, picked


def test_without_quotas_groups_share_evenly_and_what_one_leaves_goes_on(rows):
    counts, picked = shares(rows, {}, 600)
    assert counts == {"law": 10, "math": 25, "news": 25}
    best = np.argsort(-rows.scores[LABELS == "math", 0])[:25] + 10
    assert set(best.tolist()) == set(picked.ids[LABELS[picked.ids] == "math"].tolist())


def test_a_quota_is_a_share_of_the_tokens(rows):
    counts, picked = shares(rows, {"news": 0.5, "math": 0.1}, 400)
    assert counts == {"law": 10, "math": 4, "news": 20}
    head = LABELS[picked.ids[:17]]  # every group from the start, in its proportion
    assert {v: int((head == v).sum()) for v in counts} == {"law": 5, "math": 2, "news": 10}


@pytest.mark.parametrize("picker", ["top_k", "gumbel", "coverage", "balanced"])
def test_the_budget_holds_whatever_the_picker(rows, picker):
    counts, _ = shares(rows, {"math": 0.2}, 335, picker)
    assert sum(counts.values()) * 10 <= 335
    assert counts["math"] <= 6


def test_a_value_that_no_row_has(rows):
    with pytest.raises(ValueError, match="names 'sport', which no row has\nhint: there are 'law'"):
        shares(rows, {"sport": 0.5}, 100)


def test_through_a_run(tiny_model, tiny_data, tmp_path):
    lines = tiny_data["small_pool"].read_text().splitlines()
    pool = [{**json.loads(line), "domain": "ab"[k % 2]} for k, line in enumerate(lines)]
    data = {**tiny_data, "pool": write_jsonl(tmp_path / "pool.jsonl", pool)}
    fixed = {"selection.max_tokens": 1000, "selection.groups": "domain"}
    quotas = {"selection.quotas": {"a": 0.8}}
    planned(tmp_path / "run", tiny_model, data, fixed={**fixed, **quotas})
    with stages.at_work(RunFolder(tmp_path / "run"), silent) as work:
        stages.select(work, work.main)
    chosen = (tmp_path / "run/selected/selected.jsonl").read_text().splitlines()
    domains = [json.loads(line)["domain"] for line in chosen]
    assert 3 < domains.count("a") / domains.count("b") < 5

    planned(tmp_path / "other", tiny_model, data, fixed={**fixed, "selection.groups": "source"})
    with (
        stages.at_work(RunFolder(tmp_path / "other"), silent) as work,
        pytest.raises(ValueError, match="no row of the pool has\nhint: its other columns are dom"),
    ):
        stages.select(work, work.main)

    for wrong, says in (
        ({"selection.quotas": {"a": 0.8}}, "quotas needs selection.groups"),
        ({**fixed, "selection.quotas": {"a": 0.8, "b": 0.3}}, "of together at most 1"),
    ):
        with pytest.raises(ValueError, match=says):
            planned(tmp_path / "bad", tiny_model, data, fixed=wrong)
