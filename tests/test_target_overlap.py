"""Rows of the pool that are also a target's own: trained on, counted, and told."""

from __future__ import annotations

import json

from tests.conftest import write_jsonl
from tests.runs import asked, planned, silent
from thrifty import near_overlap, stages
from thrifty.data.pool import read_rows
from thrifty.data.store import build_store, open_store
from thrifty.data.tokens import load_tokenizer
from thrifty.preparation import plan_run
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


def test_rows_that_say_nearly_the_same_as_a_dev_row_are_counted_by_the_plan(
    tiny_model, tiny_data, tmp_path
):
    text = " ".join(f"word{number}" for number in range(40))
    held = [{"prompt": "say", "completion": f" {text} {name}"} for name in ("first", "second")]
    pool = [json.loads(line) for line in tiny_data["small_pool"].read_text().splitlines()]
    near = {"prompt": "say", "completion": f" {text} third"}
    far = {"prompt": "say", "completion": " ".join(text.split()[::-1])}
    data = {
        **tiny_data,
        "dev": write_jsonl(tmp_path / "dev.jsonl", held),
        "pool": write_jsonl(tmp_path / "pool.jsonl", [*pool, near, far, held[1]]),
    }
    said: list[str] = []
    plan_run(asked(tiny_model, data), tmp_path / "run", said.append)
    (line,) = [line for line in said if "nearly the same as a dev or test row" in line]
    assert line.startswith(f"1 of {len(pool) + 3:,} rows of the pool say nearly the same")
    plan_run(asked(tiny_model, {**data, "pool": tiny_data["small_pool"]}), tmp_path / "b", silent)
    run = RunFolder(tmp_path / "b")
    assert list(near_overlap.of_run(run)) == []


def test_of_a_large_pool_shards_are_looked_at(tiny_model, tiny_data, tmp_path, monkeypatch):
    pool = build(tiny_model, tiny_data["pool"], tmp_path / "pool")
    held = build(tiny_model, tiny_data["dev"], tmp_path / "dev")
    assert near_overlap.num_near(pool, [held])[1] == len(pool) == 900
    monkeypatch.setattr(near_overlap, "MOST_ROWS", 250)
    assert near_overlap.num_near(pool, [held])[1] == 300
    assert near_overlap.num_near(pool, []) == (0, 0)


def build(model, rows, folder):
    tokenizer = load_tokenizer(str(model))
    read = read_rows([str(rows)], task="sft")
    build_store(read, folder, tokenizer, 64, shard_rows=100, tokenizer_fingerprint="")
    return open_store(folder)
