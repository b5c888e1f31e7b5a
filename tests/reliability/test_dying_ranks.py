"""Two ranks of a run: a signal to either stops both together, saved; one that is killed, stopped or
hangs ends both within a bound; and the same command goes on to the same weights."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.reliability.processes import (
    Running,
    open_leases,
    same_end,
    start,
    start_anew,
    step_saved,
    wait_for,
    wait_until_doing,
)
from tests.runs import ledger, planned
from thrifty import launch, rank_watch
from thrifty.core.budget import Budget
from thrifty.interruption import PauseCallback

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

STEPS = 16
FIXED = {
    "training.max_steps": STEPS,
    "training.eval_steps": 8,
    "training.save_steps": 8,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 6,  # long enough for a signal to find its way
    "training.devices": 2,
    "selection.scorer": "length",
}
PATIENCE = 3.0
BOUND = PATIENCE + 10
"""Seconds; half a second from look to look, and what a busy machine adds."""
LAUNCHED_BOUND = BOUND + 60
"""A launcher waits first (torchrun 30 s) before it kills; the rest is for processes to end in."""


@pytest.fixture(scope="module")
def plan_of(tiny_model, tiny_data):
    def plan(folder: Path, **fixed) -> Path:
        budget = Budget(flops=1e12)
        planned(folder, tiny_model, tiny_data, budget=budget, fixed={**FIXED, **fixed})
        return folder

    return plan


def both(folder: Path, patience: float = PATIENCE) -> list[Running]:
    """The ranks, forked from this process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch._free_port())}
    shared |= {"WORLD_SIZE": "2", rank_watch.PATIENCE_VARIABLE: str(patience)}
    return [
        start("train", str(folder), RANK=str(number), LOCAL_RANK=str(number), **shared)
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def straight(plan_of, tmp_path_factory) -> Path:
    """The run that nobody touched."""
    folder = plan_of(tmp_path_factory.mktemp("straight") / "run")
    ranks = both(folder, patience=60)
    assert [one.ended() for one in ranks] == [0, 0], ranks[0].said + ranks[1].said
    return folder


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    """Handed down to what is forked: these steps take less time than a signal's way to rank 0."""
    monkeypatch.setattr(rank_watch, "_LOOK_SECONDS", 0.05)


def goes_on(folder: Path, straight: Path) -> None:
    ranks = both(folder, patience=60)
    assert [one.ended() for one in ranks] == [0, 0], ranks[0].said + ranks[1].said
    same_end(straight, folder)
    useful = [ledger(each).spent(lost=False).flops for each in (straight, folder)]
    assert useful[1] == pytest.approx(useful[0], rel=1e-9)


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.long
def test_a_signal_to_one_stops_both_at_the_same_step(asked, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    ranks = both(folder, patience=60)
    wait_until_doing(ranks[0], folder, "train", step=2)
    ranks[asked].send(signal.SIGTERM)
    assert ranks[0].ended() == 5, ranks[0].said
    assert ranks[1].ended() == 0, ranks[1].said
    saved = step_saved(folder)
    assert 2 <= saved < STEPS
    assert f"stopped after step {saved}, which is saved" in ranks[0].said
    assert ("rank 1 was interrupted by SIGTERM" in ranks[0].said) == (asked == 1)
    assert open_leases(folder) == 0
    goes_on(folder, straight)


@pytest.mark.slow
def test_a_signal_to_one_before_training_stops_both(straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    ranks = both(folder, patience=60)
    wait_until_doing(ranks[0], folder, "evaluate")
    ranks[1].send(signal.SIGUSR1)
    assert ranks[0].ended() == 5, ranks[0].said
    assert ranks[1].ended() in (0, 5), ranks[1].said
    goes_on(folder, straight)


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.long
def test_one_that_is_killed_ends_the_other(dies, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    ranks = both(folder)
    wait_until_doing(ranks[0], folder, "train", step=2)
    ranks[dies].send(signal.SIGKILL)
    assert ranks[1 - dies].ended(BOUND) == 5, ranks[1 - dies].said
    assert "rank" in ranks[1 - dies].said
    assert "looks like a bug" not in ranks[1 - dies].said
    assert ranks[dies].ended() == -signal.SIGKILL
    goes_on(folder, straight)


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.long
def test_one_that_is_stopped_ends_the_other(stopped, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    ranks = both(folder)
    wait_until_doing(ranks[0], folder, "train", step=2)
    ranks[stopped].send(signal.SIGSTOP)
    assert ranks[1 - stopped].ended(BOUND) == 5, ranks[1 - stopped].said
    assert f"rank {stopped} was not heard of for {PATIENCE:g} s" in ranks[1 - stopped].said
    ranks[stopped].kill()
    ranks[stopped].ended()
    goes_on(folder, straight)


@pytest.mark.slow
def test_a_group_that_is_stopped_as_a_whole_goes_on(straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    ranks = both(folder)
    wait_until_doing(ranks[0], folder, "train", step=2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for one in ranks:
            one.send(number)
        time.sleep(2 * PATIENCE)
    assert [one.ended() for one in ranks] == [0, 0], ranks[0].said + ranks[1].said
    same_end(straight, folder)


@pytest.mark.slow
def test_a_step_that_hangs_ends_both(straight, plan_of, tmp_path, monkeypatch):
    """The process lives and says so; its work does not go on."""
    folder, whole = plan_of(tmp_path / "run"), PauseCallback.on_step_begin
    monkeypatch.setattr(rank_watch, "FLOOR", 2)

    def hanging(self, args, state, control, **kwargs):
        whole(self, args, state, control, **kwargs)
        if state.global_step == 3 and os.environ.get("RANK") == "1":
            time.sleep(1000)

    with monkeypatch.context() as patch:  # handed down to what is forked
        patch.setattr(PauseCallback, "on_step_begin", hanging)
        ranks = both(folder)
        assert ranks[0].ended(90) == 5, ranks[0].said
        assert ranks[1].ended(30) == 5, ranks[1].said
    assert "a rank hangs" in ranks[0].said + ranks[1].said
    goes_on(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [0, 1])
@pytest.mark.parametrize("stopped", [False, True], ids=["asleep", "stopped"])
def test_one_that_hangs_before_they_have_joined_ends_the_other(
    hangs, stopped, straight, plan_of, tmp_path, monkeypatch
):
    """Rank 0 is where the others look for it."""
    folder, plain = plan_of(tmp_path / "run"), torch.distributed.init_process_group
    monkeypatch.setattr(rank_watch, "JOINS", 2)

    def joins(*arguments, **more):
        if os.environ.get("RANK") == str(hangs):
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        plain(*arguments, **more)

    with monkeypatch.context() as patch:  # handed down to what is forked
        patch.setattr(torch.distributed, "init_process_group", joins)
        ranks = both(folder)
        began = time.monotonic()
        assert ranks[1 - hangs].ended(2 * PATIENCE + BOUND) == 5, ranks[1 - hangs].said
        assert time.monotonic() - began > 2 * PATIENCE
    assert f"the ranks have not joined within {2 * PATIENCE:g} s" in ranks[1 - hangs].said
    if stopped:
        ranks[hangs].kill()
    assert ranks[hangs].ended(BOUND) == (-signal.SIGKILL if stopped else 5)
    assert open_leases(folder) == 0
    goes_on(folder, straight)


# -- started by the command itself, and by torchrun -----------------------------------------------


def ranks_of(process: Running) -> dict[int, int]:
    """Rank -> process, of those that the process started."""
    found, left = {}, [process.pid]
    while left:
        pid = left.pop()
        try:
            left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            facts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for fact in facts:
            if fact.startswith(b"RANK="):
                found[int(fact[5:])] = pid
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def launched(folder: Path, *torchrun: str, patience: float = PATIENCE) -> Running:
    patient = {rank_watch.PATIENCE_VARIABLE: str(patience)}
    return start_anew(*torchrun, "-m", "thrifty", "train", str(folder), **patient)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_to_one_of_the_commands_ranks(straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = launched(folder, patience=60)
    wait_until_doing(process, folder, "train", step=2)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    assert process.ended() == 5, process.said
    assert f"stopped after step {step_saved(folder)}, which is saved" in process.said
    assert open_leases(folder) == 0
    goes_on(folder, straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=str)
def test_a_signal_to_the_command(number, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = launched(folder, patience=60)
    wait_until_doing(process, folder, "train", step=2)
    process.send(number)
    assert process.ended() == 5, process.said
    assert 2 <= step_saved(folder) < STEPS
    assert open_leases(folder) == 0
    goes_on(folder, straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_one_of_the_commands_ranks_dies_or_hangs(number, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = launched(folder)
    wait_until_doing(process, folder, "train", step=2)
    os.kill(ranks_of(process)[1], number)
    assert process.ended(LAUNCHED_BOUND) == 5, process.said
    goes_on(folder, straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_orphans_stop_saved(straight, plan_of, tmp_path):
    """Where the process that started them is killed."""
    folder = plan_of(tmp_path / "run", **{"training.max_steps": 2000})
    process = launched(folder)
    wait_until_doing(process, folder, "train", step=2)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(lives, ranks.values())), seconds=60)
    assert process.ended() == -signal.SIGKILL
    assert "the process that started the ranks is gone" in process.said
    assert f"stopped after step {step_saved(folder)}, which is saved" in process.said
    assert open_leases(folder) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_torchrun_a_signal_to_one_stops_both(straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = launched(folder, *TORCHRUN, patience=60)
    wait_until_doing(process, folder, "train", step=2)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    assert process.ended() == 1, "torchrun has a code of its own"
    assert f"stopped after step {step_saved(folder)}, which is saved" in process.said
    assert open_leases(folder) == 0
    goes_on(folder, straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_under_torchrun_one_dies_or_hangs(number, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = launched(folder, *TORCHRUN)
    wait_until_doing(process, folder, "train", step=2)
    ranks = ranks_of(process)
    os.kill(ranks[1], number)
    assert process.ended(LAUNCHED_BOUND) == 1, process.said
    assert not any(map(lives, ranks.values()))
    goes_on(folder, straight)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_patience_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv(rank_watch.PATIENCE_VARIABLE, text)
    with pytest.raises(ValueError, match=r"THRIFTY_RANK_PATIENCE is .*\nhint: "):
        rank_watch.patience()
