"""What was scored once is taken over by the next run, and by no run that it does not fit."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from tests.runs import ledger, planned, silent
from thrifty import stages
from thrifty.core.budget import Cost
from thrifty.core.plan import Target
from thrifty.run_folder import RunFolder
from thrifty.selection import _of_a_shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    measured = shutil.copytree(os.environ["THRIFTY_CACHE"], tmp_path / "cache")
    monkeypatch.setenv("THRIFTY_CACHE", str(measured))
    monkeypatch.setenv("THRIFTY_ROWS_CACHE_GIB", "1")


@pytest.fixture
def select(tiny_model, tiny_data, tmp_path):
    def run(name, **changes):
        data = {**tiny_data, "pool": tiny_data["small_pool"], **changes.pop("data", {})}
        fixed = {"selection.scorer": "embedding", "selection.max_tokens": 900, **changes}
        folder = tmp_path / name
        planned(folder, tiny_model, data, fixed=fixed)
        with stages.at_work(RunFolder(folder), silent) as work:
            stages.select(work, work.main)
        rows = (folder / "selected" / "selected.jsonl").read_text().splitlines()
        return folder, [json.loads(row)["id"] for row in rows]

    return run


def spent(folder) -> Cost:
    return ledger(folder).spent(stage="select")


def test_the_next_run_takes_over_and_says_what_it_saved(select):
    first, rows = select("first")
    paid = spent(first).flops
    assert paid > 0
    second, same = select("second", **{"selection.picker": "gumbel"})
    third, again = select("third")
    assert spent(second).flops == spent(third).flops == 0
    assert again == rows != same
    (decision,) = [d for d in ledger(third).decisions() if d["name"] == "score or take over"]
    assert f"took {paid:.3g} FLOPs" in decision["reason"]
    (note,) = (third / "scores").glob("embedding-*/cost.json")
    known = json.loads(note.read_text())
    assert known["flops"] == paid
    assert known["method"] == "embedding"


def test_the_next_plan_knows_what_it_need_not_pay(select):
    first, _ = select("first")
    again, _ = select("again")
    paid, free = (RunFolder(each).plan().predicted["select"]["flops"] for each in (first, again))
    assert paid > spent(again).flops == free == 0
    why = RunFolder(again).plan().why["selection.scorer"]
    assert why.endswith("an earlier run left its scores, which are taken over")
    asked, _ = select("options", **{"selection.scorer": {"embedding": {"by": "mean"}}})
    assert RunFolder(asked).plan().predicted["select"]["flops"] > 0


def test_spelling_out_a_default_asks_for_the_same_scores(select):
    select("first")
    spelt, _ = select("spelt", **{"selection.scorer": {"embedding": {"by": "max"}}})
    assert spent(spelt).flops == 0


def test_targets_in_another_order_are_other_scores(tiny_model, tiny_data, tmp_path):
    """Which column is whose is a matter of the order."""
    parts = {"dev": (str(tiny_data["dev"]),), "test": (str(tiny_data["test"]),)}
    targets = {
        "a": Target(signal=(str(tiny_data["signal"]),), **parts),
        "b": Target(signal=(str(tiny_data["dev"]),), **parts),
    }
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    columns = []
    for names in ("ab", "ba"):
        folder = tmp_path / names
        ordered = {name: targets[name] for name in names}
        fixed = {"selection.scorer": "bm25", "selection.max_tokens": 900}
        planned(folder, tiny_model, data, targets=ordered, fixed=fixed)
        with stages.at_work(RunFolder(folder), silent) as work:
            stages.select(work, work.main)
        (scores,) = (folder / "scores").rglob("shard-00000.parquet")
        columns.append([pq.read_table(scores).column(f"score_{i}") for i in range(2)])
    assert columns[0] == columns[1][::-1]
    assert columns[0] != columns[1]


@pytest.mark.parametrize("scorer", ["length", "perplexity"])
def test_rows_of_the_same_words_are_other_rows(scorer, select, tiny_data, tmp_path):
    """Where the answer begins is not in their words, and case is not in their fingerprints."""
    rows = [json.loads(line) for line in tiny_data["small_pool"].read_text().splitlines()]
    moved = tmp_path / "moved.jsonl"
    with moved.open("w") as file:
        for row in rows:
            half = len(row["completion"]) // 2
            prompt, completion = row["completion"][:half], row["completion"][half:]
            row |= {"prompt": row["prompt"] + prompt, "completion": completion}
            file.write(json.dumps(row) + "\n")
    select("first", **{"selection.scorer": scorer})
    second, _ = select("second", **{"selection.scorer": scorer}, data={"pool": moved})
    assert not [d for d in ledger(second).decisions() if d["name"] == "score or take over"]


def test_rows_that_a_method_names_count_with_what_they_say(select, tiny_data, tmp_path):
    good = tmp_path / "good.jsonl"
    for name, lines in (("first", 4), ("same", 4), ("other", 8)):
        text = tiny_data["signal"].read_text().splitlines()[:lines]
        good.write_text("\n".join(text) + "\n")
        folder, _ = select(name, **{"selection.scorer": {"quality": {"good": [str(good)]}}})
        taken = [d for d in ledger(folder).decisions() if d["name"] == "score or take over"]
        assert bool(taken) == (name == "same")


def test_a_model_counts_with_what_it_is_read_by(select, tiny_model, tmp_path):
    own = shutil.copytree(tiny_model, tmp_path / "own")
    named = {"selection.scorer": {"loss": {"model": str(own)}}}
    select("first", **named)
    again, _ = select("again", **named)
    assert spent(again).flops == 0
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    other, _ = select("other", **named)
    assert spent(other).flops > 0


@pytest.mark.long
def test_other_options_and_other_targets_are_scored_anew(select, tiny_data):
    select("first")
    other, _ = select("options", **{"selection.scorer": {"embedding": {"by": "mean"}}})
    assert spent(other).flops > 0
    target, _ = select("target", data={"signal": tiny_data["dev"]})
    assert spent(target).flops > 0


@pytest.mark.long
def test_switched_off_or_damaged_it_is_as_if_there_were_none(select, tmp_path, monkeypatch):
    select("first")
    for file in (tmp_path / "cache" / "scores").glob("*/cost.json"):
        file.write_text("{")
    damaged, _ = select("damaged")
    assert spent(damaged).flops > 0
    monkeypatch.setenv("THRIFTY_ROWS_CACHE_GIB", "0")
    off, _ = select("off")
    assert spent(off).flops > 0


@pytest.mark.slow
def test_a_control_s_rival_is_not_said_to_have_paid(select, tmp_path):
    from thrifty import pipeline
    from thrifty.report.summary import summarize
    from thrifty.report.words import against_control

    select("first")
    folder, _ = select("second", control=True)
    pipeline.run(folder, silent)
    said, _ = against_control(summarize(RunFolder(folder)))
    assert "scoring taken over from an earlier run" in said


def test_what_preparing_took_is_not_reserved_again_for_every_shard():
    """A scorer that does all its work before the first shard would not fit its own prediction."""
    predicted = Cost(flops=100.0, seconds=10.0)
    each = _of_a_shard(predicted, Cost(flops=75.0, seconds=2.0), 5)
    assert (each.flops, each.seconds) == (5.0, 1.6)
    assert _of_a_shard(predicted, Cost(flops=120.0), 5).flops == 2.0


def test_good_rows_of_one_s_own_need_no_target(tiny_model, tiny_data, tmp_path):
    scorer = {"quality": {"good": [str(tiny_data["signal"])]}}
    fixed = {"selection.scorer": scorer, "selection.max_tokens": 900}
    data, folder = {**tiny_data, "pool": tiny_data["small_pool"]}, tmp_path / "run"
    planned(folder, tiny_model, data, targets={}, fixed=fixed)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    (scores,) = (folder / "scores").rglob("shard-00000.parquet")
    assert pq.read_table(scores).column_names == ["id", "score_0"]
    with pytest.raises(ValueError, match="quality needs a target"):
        planned(
            tmp_path / "none",
            tiny_model,
            data,
            targets={},
            fixed={**fixed, "selection.scorer": "quality"},
        )
