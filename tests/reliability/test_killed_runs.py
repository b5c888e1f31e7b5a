"""Whole runs that are killed: they end like one that nobody touched, or within their budget, and
never begin anew without saying so."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import finish, interrupt_at, ledger, planned, silent
from thrifty import checkpoints, stages, training
from thrifty.core.budget import Budget
from thrifty.evaluation import Measured
from thrifty.run_folder import RunFolder

HEADROOM = Budget(flops=1e13)
STEPS = {
    "selection.max_tokens": 900,
    "training.max_steps": 9,
    "training.warmup_steps": 1,
    "training.cooldown_steps": 2,
    "training.eval_steps": 3,
    "training.save_steps": 3,
}
ANEW = {
    "selection.scorer": "loss",
    "selection.refresh.when": "fixed",
    "selection.refresh.times": 1,
    "selection.refresh.probe_rows": 16,
    "selection.refresh.shortlist": 0.3,
}
STARTS_OVER = "starts over from the base model"


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.long
def test_nothing_starts_over_without_a_line(gone, tiny_model, tiny_data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    planned(run, tiny_model, data, fixed=STEPS, budget=HEADROOM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(training.Interrupted):
            finish(run)
    said: list[str] = []
    if gone:
        shutil.rmtree(run / "checkpoints")
    else:
        for checkpoint in checkpoints.committed(run / "checkpoints"):
            (checkpoint.path / "model.safetensors").write_bytes(b"torn")
    finish(run, said.append)
    assert sum(STARTS_OVER in line for line in said) == 1
    assert sum("is not whole: checkpoint-" in line for line in said) == (0 if gone else 2)
    assert ledger(run).evaluations()[-1]["step"] == 9


@pytest.mark.slow
def test_a_test_that_is_done_again_is_useful_once(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Stopped between its charge and its end."""
    run = tmp_path / "run"
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    planned(run, tiny_model, data, fixed=STEPS, budget=HEADROOM)
    finish(run)

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    def test() -> None:
        with stages.at_work(RunFolder(run), silent) as work:
            stages.test(work, work.main)

    with monkeypatch.context() as patch:
        patch.setattr(Measured, "save", full)
        with pytest.raises(OSError, match="full"):
            test()
    once = ledger(run).spent(stage="test").flops
    test()
    book = ledger(run)
    assert book.spent(stage="test").flops == 2 * once
    assert book.spent(stage="test", lost=False).flops == once


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_dies_at_numbered_steps_and_ends_the_same(tiny_model, tiny_data, tmp_path):
    """Of its three hundred and thirty some; ``every_step.py`` by hand tries them all, in half an
    hour."""
    run = tmp_path / "run"
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    planned(run, tiny_model, data, fixed={**STEPS, **ANEW}, budget=HEADROOM)
    program = [sys.executable, "-m", "tests.reliability.every_step", str(run), str(tmp_path)]
    done = subprocess.run(
        [*program, "11", "1000", "11"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ", 0 otherwise" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_budget_that_binds_ends_it_earlier_and_never_over(tiny_model, tiny_data, tmp_path):
    """What kills waste is taken off the end."""
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    fixed = {**STEPS, "training.max_steps": 30}
    whole, run = tmp_path / "whole", tmp_path / "run"
    planned(whole, tiny_model, data, fixed=fixed, budget=HEADROOM)
    assert command("run", whole).returncode == 0
    limit = ledger(whole).spent().flops * 1.02
    planned(run, tiny_model, data, fixed=fixed, budget=Budget(flops=limit))
    for number in (200, 120, 160):
        assert command("run", run, dies_at=number).returncode == -signal.SIGKILL
    ended = command("run", run)
    assert ended.returncode == 0, ended.stderr
    book = ledger(run)
    assert 0 < book.spent(lost=True).flops < book.spent().flops <= limit
    assert min(book.left().values()) >= 0
    last, of_whole = (each.evaluations()[-1]["step"] for each in (book, ledger(whole)))
    assert 0 < last < of_whole
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()


def command(name: str, run: Path, dies_at: int | None = None) -> subprocess.CompletedProcess[str]:
    """``thrifty NAME RUN``, killed before a numbered step within the run's folder."""
    before = ["tests.reliability.injected", str(dies_at), str(run)] if dies_at else ["thrifty"]
    line = [sys.executable, "-m", *before, name, str(run)]
    return subprocess.run(line, capture_output=True, text=True, check=False)
