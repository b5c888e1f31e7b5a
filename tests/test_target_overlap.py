"""Rows of the pool that are also a target's own: trained on, counted, and told."""

from __future__ import annotations

import json

from tests.conftest import write_jsonl
from tests.runs import planned, silent
from thrifty import stages
from thrifty.report.page import render
from thrifty.report.summary import summarize
from thrifty.report.words import decided, in_targets
from thrifty.run_folder import RunFolder


def test_chosen_rows_that_are_a_targets_are_counted_and_told(tiny_model, tiny_data, tmp_path):
    signal = [json.loads(line) for line in tiny_data["signal"].read_text().splitlines()]
    pool = [json.loads(line) for line in tiny_data["small_pool"].read_text().splitlines()]
    # Case and white space make no other row, a dev row stays out, a repeated one counts once.
    shouted = {"prompt": "  " + signal[1]["prompt"].upper(), "completion": signal[1]["completion"]}
    dev = json.loads(tiny_data["dev"].read_text().splitlines()[0])
    rows = [*pool, signal[0], signal[0], shouted, dev]
    data = {**tiny_data, "pool": write_jsonl(tmp_path / "pool.jsonl", rows)}
    run = RunFolder(tmp_path / "run")
    planned(run.path, tiny_model, data, fixed={"selection.max_tokens": 1e9})
    with stages.at_work(run, silent) as work:
        stages.select(work, work.main)
    manifest = json.loads((run.selected("budget") / "manifest.json").read_text())
    assert manifest["in_targets"] == {"sums": 2}
    assert manifest["dropped"]["also in dev rows of sums"] == 1
    summary = summarize(run)
    assert summary["selection"]["in_targets"] == {"sums": 2}
    assert "2 in sums" in in_targets(summary["selection"]["in_targets"])
    assert "2 in sums. They may be trained on" in render(run)
    assert "Keep" in decided(summary)


def test_without_such_rows_nothing_is_said(tiny_model, tiny_data, tmp_path):
    run = RunFolder(tmp_path / "run")
    planned(run.path, tiny_model, {**tiny_data, "pool": tiny_data["small_pool"]})
    with stages.at_work(run, silent) as work:
        stages.select(work, work.main)
    assert summarize(run)["selection"]["in_targets"] == {}
    assert in_targets({}) == ""
    assert "own rows" not in render(run)
