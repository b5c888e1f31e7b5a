"""One tiny run through the commands against its record: what was chosen, charged and measured.

`make golden` records it anew; look at the diff of golden.json before committing it. Seconds are
not in it. FLOPs and tokens must be equal; losses to a thousandth, for processors add in different
orders.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from thrifty.cli import main
from thrifty.report.summary import summarize
from thrifty.run_folder import RunFolder

RECORD = Path(__file__).with_name("golden.json")
ANEW = "THRIFTY_RECORD" in os.environ


@pytest.fixture(scope="module")
def golden(tiny_model, tiny_data, tmp_path_factory) -> dict[str, Any]:
    """What the run that was just made would be recorded as."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    plan = ["plan", "--model", str(tiny_model), "--pool", str(tiny_data["pool"]), "--control"]
    plan += ["--target", f"sums={tiny_data['signal']}", "--dev", f"sums={tiny_data['dev']}"]
    plan += ["--test", f"sums={tiny_data['test']}", "--flops", "6e9", "--scorer", "bm25"]
    settings = {"max_length": 64, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    held = {"memory.trained": "full", "memory.weights": "float32"}
    for key, value in {**settings, **held}.items():
        plan += ["--set", f"training.{key}={value}"]
    assert main([*plan, "-o", str(folder)]) == 0
    assert main(["run", str(folder)]) == 0
    made = record(RunFolder(folder))
    if ANEW:
        text = json.dumps(made, indent=1, ensure_ascii=False)
        rows = re.sub(r"\[[^][{}]*\]", lambda row: re.sub(r"\s+", " ", row[0]), text)
        RECORD.write_text(rows + "\n", encoding="utf-8")
    return made


def record(run: RunFolder) -> dict[str, Any]:
    planned = yaml.safe_load(run.plan_file.read_text(encoding="utf-8"))
    summary = summarize(run)
    with run.reading() as ledger:
        names = {stage["id"]: stage["name"] for stage in ledger.stages()}
        charged = [
            [
                names[c["stage_id"]],
                c["activity"],
                c["step_from"],
                c["step_to"],
                c["flops"],
                c["tokens"],
            ]
            for c in ledger.charges()
        ]
        evaluated = [
            [e["stage"], e["step"], e["flops"], e["objective"]]
            for account in ("budget", "control")
            for e in ledger.evaluations(account=account)
        ]
        decided = [
            [d["stage"], d["step"], d["name"], d["chosen"]]
            for d in ledger.decisions()
            if d["name"] != "which model to keep"  # the last few are close
        ]
    return {
        "plan": {key: planned[key] for key in ("selection", "training", "stopping")},
        "predicted": {
            stage: [cost["flops"], cost["tokens"]] for stage, cost in planned["predicted"].items()
        },
        "charges": charged,
        "evaluations": evaluated,
        "decisions": decided,
        "report": [
            [stage["name"], stage["measured"]["flops"], stage["gain"]]
            for stage in summary["stages"]
        ],
        "test_loss": summary["test_loss"],
        "gain_over_control": summary["control"]["gain_over_control"],
    }


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["plan", "predicted", "charges", "decisions"])
def test_what_was_decided_and_charged(part, golden):
    assert golden[part] == recorded()[part]


@pytest.mark.parametrize("part", ["evaluations", "report", "test_loss", "gain_over_control"])
def test_what_was_measured(part, golden):
    assert_close(golden[part], recorded()[part], part)


def assert_close(found: Any, expected: Any, where: str) -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for n, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{where}[{n}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3), where
    else:
        assert found == expected, where
