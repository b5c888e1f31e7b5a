"""Gradients that a scorer keeps: a killed command goes on within the shard, `verify` looks at
them, and a flipped byte of theirs stops the command that would use it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.reliability.processes import start, wait_for
from tests.runs import ledger, planned
from thrifty.cli import main
from thrifty.core import sums
from thrifty.core.budget import Budget
from thrifty.signals.gradient_store import GradientStore

FEW = {"max_warmup_rows": 16, "epochs": 1, "rank": 2, "dimensions": 64, "max_target_rows": 4}
ENOUGH = Budget(flops=1e15)


class Some:
    """Five rows."""

    ids = np.arange(5)
    fingerprints = tuple(int(i).to_bytes(16, "big") for i in ids)

    def __len__(self) -> int:
        return 5


def kept(folder: Path) -> list[Path]:
    """Files of a store of ``Some``, all that say something."""
    store = GradientStore.open(folder, 16, 16, {"model": "m"}, 5)
    writing = store.writing(Some())
    writing.add(range(5), np.random.default_rng(0).normal(size=(5, 16)))
    writing.finish()
    weights = folder / ".weights"
    weights.write_bytes(bytes(range(200)))
    sums.keep(weights, folder / "adapter.safetensors")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def plan(tiny_model, tiny_data, tmp_path_factory):
    """A run that is planned with a store outside, and where that is to be."""
    home = tmp_path_factory.mktemp("kept")
    scorer = {"less": {**FEW, "store": str(home / "store")}}
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    fixed = {"selection.scorer": scorer, "training.max_steps": 4}
    planned(home / "run", tiny_model, data, fixed=fixed, budget=ENOUGH)
    return home / "run", home / "store"


@pytest.mark.parametrize("where", ["in the run", "outside"])
def test_verify_names_the_file_of_any_flipped_byte_of_a_store(where, plan, capsys):
    run, outside = plan
    folder = (run / "gradients" if where == "in the run" else outside) / "checkpoint-0"
    files = kept(folder)
    name = "gradients/checkpoint-0" if where == "in the run" else str(folder)

    def verified() -> tuple[int, dict]:
        code = main(["verify", str(run), "--json"])
        parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
        return code, parts[name]

    assert verified() == (0, {"name": name, "state": "ok", "faults": []})
    assert len(files) == 4
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        code, part = verified()
        assert code == 4
        assert part["state"] == "damaged"
        assert file.name in part["faults"][0]
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert verified()[0] == 0


def test_verify_of_a_store_that_is_not_there_says_so(plan, capsys):
    run, _ = plan
    text = (run / "plan.yaml").read_text(encoding="utf-8")
    try:
        (run / "plan.yaml").write_text(re.sub(r"(store: \S+)", r"\1-none", text), encoding="utf-8")
        assert main(["verify", str(run)]) == 0
    finally:
        (run / "plan.yaml").write_text(text, encoding="utf-8")
    assert re.search(r"not known +\S+store-none: there are no gradients", capsys.readouterr().out)


@pytest.mark.slow
def test_a_killed_command_goes_on_within_the_shard_and_a_flipped_byte_stops_it(
    tiny_model, tiny_data, tmp_path, monkeypatch, capsys
):
    """To the same scores, bit for bit, at fewer FLOPs than anew."""
    monkeypatch.setattr("thrifty.signals.example_gradients.BATCH_TOKENS", 100)
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    runs = [tmp_path / "straight", tmp_path / "killed"]
    for run in runs:
        scorer = {"less": {**FEW, "store": str(run / "gradients")}}
        fixed = {"selection.scorer": scorer, "training.max_steps": 4}
        planned(run, tiny_model, data, fixed=fixed, budget=ENOUGH)
    straight, killed = runs
    monkeypatch.setenv("THRIFTY_ROWS_CACHE_GIB", "0")
    assert main(["select", str(straight)]) == 0
    process = start("select", str(killed))
    wait_for(lambda: any(killed.glob("gradients/checkpoint-0/.rows-*")) or not process.is_there())
    process.send(signal.SIGKILL)
    assert process.ended() == -signal.SIGKILL
    (left,) = killed.glob("gradients/checkpoint-0/.rows-*")
    done = np.fromfile(left, dtype=np.uint8).size
    assert done > 0
    assert main(["select", str(killed)]) == 0
    tables = [pq.read_table(next(run.glob("scores/*/shard-00000.parquet"))) for run in runs]
    assert tables[0].equals(tables[1])
    once, twice = (
        sum(c["flops"] for c in ledger(run).charges() if c["activity"] == "score" and not c["lost"])
        for run in runs
    )
    assert 0 < twice < once
    whole = [next(run.glob("gradients/checkpoint-0/rows-*.bin")) for run in runs]
    assert whole[0].read_bytes() == whole[1].read_bytes()
    flipped = bytearray(whole[1].read_bytes())
    flipped[1000] ^= 1
    whole[1].write_bytes(flipped)
    for folder in (*killed.glob("scores"), *killed.glob("selected")):
        for file in folder.rglob("*"):
            if file.is_file():
                file.unlink()
    capsys.readouterr()
    assert main(["select", str(killed)]) == 4
    assert f"{whole[1].name}' is damaged: row" in capsys.readouterr().err
