"""The summary: every promised key, sums that agree with the ledger, null for what is not known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.report import runs
from thrifty.core.budget import RESOURCES
from thrifty.core.ledger import Rates
from thrifty.report.summary import summarize
from thrifty.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runs.finished(tmp_path_factory.mktemp("runs") / "finished")


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


def test_promised_keys(finished: RunFolder) -> None:
    s = summarize(finished)
    assert s["run"] == "finished"
    assert s["state"] == "done"
    assert s["task"] == "sft"
    assert s["model"] == {"path": "models/small", "num_parameters": None}
    assert s["objective"] == {
        "metric": "dev_loss",
        "name": "loss",
        "unit": "nats/token",
        "more_is_better": False,
    }
    for part in ("budget", "spent", "lost", "predicted", "left"):
        assert set(s[part]) == set(RESOURCES)
    assert s["budget"]["flops"] == 1e13
    assert s["budget"]["peak_memory_bytes"] == 2.0 * 2**30
    assert s["budget"]["dollars"] is None
    for stage in s["stages"]:
        assert {"name", "method", "state", "account", "predicted", "measured"} <= set(stage)
        assert set(stage["gain_per"]) == {"pflop", "device_second", "dollar", "gb_second"}
    for decision in s["decisions"]:
        assert {"stage", "step", "name", "chosen", "reason", "choice", "detail"} <= set(decision)
    for evaluation in s["evaluations"]:
        assert set(evaluation) == {
            "step",
            "flops",
            "loss",
            "score",
            "stderr",
            "by_target",
            "beside",
        }
    assert s["selection"] == {
        "scorer": "bm25",
        "picker": "top_k",
        "num_candidates": 5120,
        "num_selected": 640,
        "tokens_selected": 199_840,
        "dropped": {"duplicate": 41, "in dev rows of asyncio": 3},
        "in_targets": {"asyncio": 2},
    }
    assert s["quarantine"]["num_bad"] == 16
    assert s["quarantine"]["by_reason"] == {"bad_json": 3, "empty": 12, "nul": 1}


def test_plain_json_of_finite_numbers(finished: RunFolder) -> None:
    s = summarize(finished)
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    assert all(math.isfinite(n) for n in numbers(s))


def test_sums_are_the_ledgers(finished: RunFolder) -> None:
    s = summarize(finished)
    with finished.reading() as ledger:
        assert s["spent"] == pytest.approx(ledger.spent().to_dict())
        assert s["control"]["spent"]["flops"] == ledger.spent(account="control").flops
    own = [stage for stage in s["stages"] if stage["account"] == "budget"]
    for resource in ("flops", "tokens", "seconds", "dollars"):
        total = sum(stage["measured"][resource] for stage in own)
        assert total == pytest.approx(s["spent"][resource])
        by_activity = sum(a[resource] for a in s["activities"] if a["account"] == "budget")
        assert by_activity == pytest.approx(s["spent"][resource])
    assert s["left"]["flops"] == s["budget"]["flops"] - s["spent"]["flops"]
    assert s["binding"] == {
        "resource": "flops",
        "share": pytest.approx(s["spent"]["flops"] / 1e13),
    }


def test_gain_per_resource(finished: RunFolder) -> None:
    s = summarize(finished)
    stages = {stage["name"]: stage for stage in s["stages"]}
    train, select = stages["train"], stages["select"]
    assert train["gain"] == pytest.approx(2.51 - 2.05)
    assert train["gain_per"]["pflop"] == pytest.approx(0.46 / 7.74e-3)
    seconds, peak = train["measured"]["seconds"], train["measured"]["peak_memory_bytes"]
    assert train["gain_per"]["gb_second"] == pytest.approx(0.46 / (seconds * peak / 1e9))
    assert train["gain_per"]["dollar"] == pytest.approx(0.46 / train["measured"]["dollars"])
    assert select["gain"] == pytest.approx(0.05)
    assert select["gain_per"]["device_second"] == pytest.approx(
        0.05 / select["measured"]["seconds"]
    )
    assert stages["test"]["gain"] is None


def test_losses_and_control(finished: RunFolder) -> None:
    s = summarize(finished)
    assert s["dev_loss"] == {"before": 2.51, "after": 2.05, "step": 100, "unit": "nats/token"}
    assert s["test_loss"]["gain"] == pytest.approx(0.43)
    assert s["test_loss"]["stderr"] == 0.011
    control = s["control"]
    assert control["gain_over_control"] == 0.05
    assert control["gain_over_control_stderr"] == 0.01
    assert control["measured_on"] == "test"
    assert control["dev_loss"] == {"before": 2.51, "after": 2.11, "step": 100}


def test_the_kept_model_is_the_best_one(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    with ledger, ledger.stage("train", "full") as stage:
        for step, loss in ((0, 3.0), (10, 2.0), (20, 2.5)):
            stage.evaluate(step, step * 1e9, loss, 0.01, {})
    assert summarize(run)["dev_loss"] == {
        "before": 3.0,
        "after": 2.0,
        "step": 10,
        "unit": "nats/token",
    }


def test_planned_run_has_nothing_measured(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    ledger.close()
    s = summarize(run)
    assert s["state"] == "planned"
    assert [stage["state"] for stage in s["stages"]] == ["planned"] * 3
    assert s["stages"][0]["predicted"]["flops"] == 1e12
    assert s["stages"][0]["measured"] == dict.fromkeys(RESOURCES)
    assert s["spent"]["flops"] == 0.0
    assert s["spent"]["dollars"] is None
    assert s["control"] is s["selection"] is s["quarantine"] is s["ended"] is s["cooldown"] is None
    assert s["dev_loss"]["before"] is s["dev_loss"]["after"] is s["test_loss"]["gain"] is None


def test_unknown_price_is_null_not_zero(tmp_path: Path) -> None:
    s = summarize(runs.finished(tmp_path / "run", price=False))
    assert s["spent"]["dollars"] is s["spent"]["joules"] is s["predicted"]["dollars"] is None
    assert all(stage["measured"]["dollars"] is None for stage in s["stages"])
    assert all(stage["gain_per"]["dollar"] is None for stage in s["stages"])


def test_no_control_is_null(tmp_path: Path) -> None:
    s = summarize(runs.finished(tmp_path / "run", with_control=False))
    assert s["control"] is None
    assert next(stage for stage in s["stages"] if stage["name"] == "select")["gain"] is None


def test_control_that_only_trained_compares_dev_losses(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan(control=True))
    with ledger:
        runs.train(ledger)
        runs.train(ledger, losses=(2.51, 2.40, 2.30, 2.20, 2.18, 2.15), account="control")
    control = summarize(run)["control"]
    assert control["gain_over_control"] == pytest.approx(0.10)
    assert control["gain_over_control_stderr"] is None
    assert control["measured_on"] == "dev"


def test_unfinished_control_is_not_compared(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan(control=True))
    with ledger:
        runs.train(ledger)
        with pytest.raises(KeyboardInterrupt):
            runs.train(ledger, losses=(2.51, 2.40), account="control", end=False)
    s = summarize(run)
    assert s["state"] == "stopped"
    assert s["control"]["gain_over_control"] is None


def test_lost_work_is_charged_and_shown(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    with ledger:
        with pytest.raises(KeyboardInterrupt):
            runs.train(ledger, losses=(2.5, 2.4, 2.3, 2.2, 2.1), end=False)
        with ledger.stage("train", "full") as stage:
            stage.roll_back(20, "training goes on from step 20")
            stage.evaluate(40, 1e13, 2.25, 0.01, {})
            stage.decide("train on or stop", "cool down and stop", "enough", step=40)
    s = summarize(run)
    (train,) = (stage for stage in s["stages"] if stage["name"] == "train")
    assert s["lost"]["flops"] == train["lost"]["flops"] == pytest.approx(3 * 1.54e12)
    assert train["measured"]["flops"] == pytest.approx(4 * 1.5e12 + 5 * 4e10)
    assert [e["step"] for e in s["evaluations"]] == [0, 20, 40]
    undone = {(d["step"], d["chosen"]): d["undone"] for d in s["decisions"] if d["stage"]}
    assert undone == {
        (40, "train on"): True,
        (60, "train on"): True,
        (40, "cool down and stop"): False,
    }
    assert s["ended"] == {"step": 40, "chosen": "cool down and stop", "reason": "enough"}
    assert s["cooldown"]["step"] == 40


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan(), Rates())
    with ledger, ledger.stage("train", "full") as stage:
        stage.evaluate(0, 1e9, 2.0, math.inf, {"a": math.nan})
        stage.decide("train on or stop", "train on", "?", detail={"forecast": {"loss": math.nan}})
    s = summarize(run)
    assert s["evaluations"][0]["stderr"] is None
    assert s["evaluations"][0]["by_target"] == {"a": None}
    json.dumps(s, allow_nan=False)


def test_broken_files_are_named_and_left_out(tmp_path: Path) -> None:
    run = runs.finished(tmp_path / "run", with_control=False)
    runs.write_selected(run, **{"manifest.json": '{"num_selected": '})
    (run.pool / "manifest.json").write_text("[]", encoding="utf-8")
    s = summarize(run)
    assert s["selection"] is s["quarantine"] is None
    assert s["unreadable"] == ["selected/manifest.json", "pool/manifest.json"]


def test_passwords_in_urls_are_masked(tmp_path: Path) -> None:
    from thrifty.core.plan import PoolSource

    secret = "s3://user:hunter2@host/pool.jsonl"
    run, ledger = runs.start(tmp_path / "run", runs.plan(pool=PoolSource(sources=(secret,))))
    with ledger:
        ledger.decide("read", "yes", f"from {secret}")
    text = json.dumps(summarize(run))
    assert "hunter2" not in text
    assert "s3://***@host/pool.jsonl" in text


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hint:"):
        summarize(RunFolder(tmp_path / "absent"))
    with pytest.raises(ValueError, match="there is no plan"):
        summarize(RunFolder(tmp_path))


def test_reading_changes_nothing(finished: RunFolder) -> None:
    before = {p: p.read_bytes() for p in finished.path.rglob("*") if p.suffix in (".yaml", ".json")}
    with finished.reading() as ledger:
        charges = ledger.charges()
    summarize(finished)
    with finished.reading() as ledger:
        assert ledger.charges() == charges
    assert {p: p.read_bytes() for p in before} == before
