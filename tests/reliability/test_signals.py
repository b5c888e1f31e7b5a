"""A signal, or the end of a job, ends a command in time, saved, with exit code 5; and the same
command goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.reliability.processes import (
    Running,
    doing,
    open_leases,
    same_end,
    signal_while_doing,
    start,
    start_anew,
    step_saved,
    wait_for,
    wait_until_doing,
)
from tests.runs import ledger, planned
from thrifty import checkpoints, deadline, stop_signals
from thrifty.cli import main
from thrifty.core.budget import Budget

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX here")

STEPS = 12
FIXED = {
    "training.max_steps": STEPS,
    "training.eval_steps": 6,
    "training.save_steps": 6,
    # Long enough that a signal comes in the middle of one.
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 2,
    "selection.scorer": "perplexity",
}


@pytest.fixture(scope="module")
def plan_of(tiny_model, tiny_data):
    def plan(folder: Path, **fixed) -> Path:
        budget = Budget(flops=1e13)
        planned(folder, tiny_model, tiny_data, budget=budget, fixed={**FIXED, **fixed})
        return folder

    return plan


@pytest.fixture(scope="module")
def straight(plan_of, tmp_path_factory) -> Path:
    """The run that nobody touched."""
    folder = plan_of(tmp_path_factory.mktemp("straight") / "run")
    assert main(["run", str(folder)]) == 0
    return folder


def stopped_in_training(process: Running, folder: Path, number: signal.Signals) -> None:
    """Send a signal in the middle of training, which must end after the step under way."""
    signal_while_doing(process, folder, "train", number, step=3)
    process.hear("finishing the step")
    now = doing(folder)
    ended_as_asked(process, folder)
    saved = step_saved(folder)
    assert f"stopped after step {saved}, which is saved" in process.said
    if now is not None and now[0] == "train":
        assert now[1] <= saved <= now[1] + 1


def ended_as_asked(process: Running, folder: Path) -> None:
    assert process.ended() == 5, process.said
    assert "the same command goes on" in process.said
    assert "error:" not in process.said
    assert "Traceback" not in process.said
    assert open_leases(folder) == 0


def goes_on(folder: Path, straight: Path) -> None:
    """To the same end; what was spent again is in the books beside it."""
    process = start("run", str(folder))
    assert process.ended() == 0, process.said
    same_end(straight, folder)
    one, other = (ledger(each) for each in (straight, folder))
    once, twice = one.spent().flops, other.spent().flops
    assert twice >= once * (1 - 1e-9)
    trained = [each.spent(stage="train", lost=False).flops for each in (one, other)]
    assert trained[1] == pytest.approx(trained[0], rel=1e-9)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.long
def test_a_signal_in_training(number, straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    stopped_in_training(start("run", str(folder)), folder, number)
    goes_on(folder, straight)


@pytest.mark.long
def test_in_every_other_phase(straight, plan_of, tmp_path):
    """One run, stopped wherever it comes to; nothing has to be saved, so it ends promptly."""
    folder = plan_of(tmp_path / "run")
    for activity, number in (
        ("score", signal.SIGTERM),
        ("evaluate", signal.SIGUSR1),  # of the base model, before the first step
        ("test", signal.SIGINT),
    ):
        process = start("run", str(folder))
        signal_while_doing(process, folder, activity, number)
        ended_as_asked(process, folder)
        assert "interrupted" in process.said
    goes_on(folder, straight)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_on_the_way(straight, plan_of, tmp_path):
    """It is finished and saved, and no further step is taken."""
    folder = plan_of(tmp_path / "run")
    process = start("run", str(folder))
    signal_while_doing(process, folder, "evaluate", signal.SIGTERM, step=6)
    ended_as_asked(process, folder)
    assert step_saved(folder) in (6, 7)  # one more where the signal came just after it
    goes_on(folder, straight)


@pytest.mark.slow
def test_a_signal_in_the_last_step_stops_the_run_too(straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = start("run", str(folder))
    signal_while_doing(process, folder, "evaluate", signal.SIGTERM, step=STEPS)
    ended_as_asked(process, folder)
    assert not (folder / "model").exists(), "it was not asked to go on to the next stage"
    goes_on(folder, straight)


@pytest.mark.slow
def test_a_terminal_that_closes(straight, plan_of, tmp_path):
    """What is then said to it goes nowhere, and breaks nothing."""
    folder = plan_of(tmp_path / "run")
    process = start("run", str(folder), terminal=True)
    wait_until_doing(process, folder, "train", step=3)
    assert process.hang_up() == 5
    assert 3 <= step_saved(folder) < STEPS
    assert open_leases(folder) == 0
    goes_on(folder, straight)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(plan_of, tmp_path):
    """Though the step under way takes many seconds yet."""
    long = {"training.gradient_accumulation_steps": 150, "training.memory.states": "adamw"}
    folder = plan_of(tmp_path / "run", **long)
    process = start("run", str(folder))
    wait_until_doing(process, folder, "train")
    process.send(signal.SIGTERM)
    process.hear("finishing the step")
    process.send(signal.SIGTERM)  # twice, as `timeout` does
    time.sleep(stop_signals.SAME_SECONDS + 0.2)
    before = time.monotonic()
    process.send(signal.SIGINT)
    assert process.ended() == 5
    assert time.monotonic() - before < 2
    assert "left at once" in process.said
    assert step_saved(folder) == 0
    process = start("run", str(folder))
    process.hear("lost with the interruption, and charged")
    process.send(signal.SIGTERM)
    ended_as_asked(process, folder)


@pytest.mark.slow
def test_the_command_as_it_is_started(straight, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run")
    process = start_anew("-m", "thrifty", "run", str(folder))
    stopped_in_training(process, folder, signal.SIGTERM)
    goes_on(folder, straight)


@pytest.mark.slow
def test_decoding(tiny_model, tmp_path):
    """Samples that were drawn are kept; the same command goes on to the same answers."""
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}:"}) + "\n" for i in range(120)))
    command = ("decode", "--model", str(tiny_model), "--prompts", str(prompts), "--samples", "2",
               "--policy", "{fixed: {samples: 2}}", "--max-tokens", "40")  # fmt: skip
    folders = [tmp_path / name for name in ("straight", "stopped")]
    assert start(*command, "-o", str(folders[0])).ended() == 0
    process = start(*command, "-o", str(folders[1]))
    wait_for(lambda: (folders[1] / "samples.jsonl").is_file())
    wait_for(lambda: (folders[1] / "samples.jsonl").read_text().count("\n") > 20)
    process.send(signal.SIGTERM)
    ended_as_asked(process, folders[1])
    process = start(*command, "-o", str(folders[1]))
    assert process.ended() == 0, process.said
    one, other = (
        [json.loads(line)["answer"] for line in (each / "answers.jsonl").read_text().splitlines()]
        for each in folders
    )
    assert one == other
    samples = map(json.loads, (folders[1] / "samples.jsonl").read_text().splitlines())
    with ledger(folders[1]) as book:
        useful, lost = (book.spent(lost=lost).flops for lost in (False, True))
    assert useful == pytest.approx(sum(row["took"]["flops"] for row in samples), rel=1e-9)
    assert 0 < lost < useful  # of the draws under way


# -- the end of a job -----------------------------------------------------------------------------


def job_ends_in(seconds: float) -> dict[str, str]:
    return {deadline.VARIABLE: str(int(time.time() + seconds))}


@pytest.fixture
def short_leaving(monkeypatch):
    """Handed down to what is forked."""
    monkeypatch.setattr(deadline, "LEAVING_SECONDS", 2.0)


@pytest.mark.slow
def test_training_ends_before_the_job_does(short_leaving, plan_of, tmp_path):
    rarely = {"training.eval_steps": 1000, "training.save_steps": 1000}  # no rule ends it before
    folder = plan_of(tmp_path / "run", **{"training.max_steps": 3000, **rarely})
    began = time.monotonic()
    process = start("run", str(folder), **job_ends_in(40))
    ended_as_asked(process, folder)
    assert time.monotonic() - began < 40
    assert "Slurm ends this job at " in process.said
    saved = step_saved(folder)
    assert f"stopped after step {saved}, which is saved" in process.said
    process = start("run", str(folder), **job_ends_in(1e9))
    process.hear(f"resuming from step {saved}")
    wait_until_doing(process, folder, "train", step=saved + 1)
    process.send(signal.SIGTERM)
    ended_as_asked(process, folder)


def test_every_other_phase_ends_before_the_job_does(short_leaving, plan_of, tmp_path):
    folder = plan_of(tmp_path / "run", **{"training.max_steps": 3000})
    process = start("run", str(folder), **job_ends_in(3))
    ended_as_asked(process, folder)
    assert "Slurm ends this job at " in process.said


@pytest.mark.parametrize("text", ["soon", "-5", "1e9", "1" * 5000, "١٢", "17000000.5"])
def test_an_end_that_is_no_time_is_told_and_not_heeded(text, monkeypatch, capsys):
    monkeypatch.setenv(deadline.VARIABLE, text)
    deadline.of_slurm.cache_clear()
    found = deadline.of_slurm()
    said = capsys.readouterr().err
    if text.isdecimal() and text.isascii():
        assert found is not None
        assert found.left > 1e8, "as far away as one can wait"
    else:
        assert found is None
        assert f"{deadline.VARIABLE} is {text!r}, which is no Unix time" in said


def test_an_end_that_has_passed_is_told_and_not_heeded(monkeypatch, capsys):
    monkeypatch.setenv(deadline.VARIABLE, str(int(time.time()) - 1000))
    deadline.of_slurm.cache_clear()
    assert main(["methods"]) == 0
    assert "SLURM_JOB_END_TIME passed 1,0" in capsys.readouterr().err


def test_a_clock_that_jumps_moves_no_end(monkeypatch):
    now = time.time()
    monkeypatch.setenv(deadline.VARIABLE, str(int(now) + 100))
    deadline.of_slurm.cache_clear()
    for jump in (0, 86400, -86400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        found = deadline.of_slurm()
        assert 90 < found.left <= 100


def test_a_rank_that_follows_heeds_no_end(monkeypatch):
    monkeypatch.setenv(deadline.VARIABLE, str(int(time.time()) + 100))
    monkeypatch.setenv("RANK", "1")
    deadline.of_slurm.cache_clear()
    assert deadline.of_slurm() is None


@pytest.fixture(autouse=True)
def no_end_is_remembered():
    yield
    deadline.of_slurm.cache_clear()


@pytest.mark.slow
def test_hours_are_a_budget(tiny_model, tiny_data, tmp_path):
    """No signal, and no code of its own: the run cools down and is done."""
    patient = {"stopping": {"plateau": {"patience": 1000}}}  # no rule ends it before
    fixed = {**FIXED, **patient, "training.max_steps": 100_000, "training.cooldown_steps": 5}
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, budget=Budget(seconds=40), fixed=fixed)
    process = start("run", str(folder))
    assert process.ended() == 0, process.said
    books = ledger(folder)
    assert books.spent().seconds <= 40
    reasons = [d["reason"] for d in books.decisions() if d["name"] == "train on or stop"]
    assert any("seconds left suffice for the cool-down" in reason for reason in reasons)
    (detail,) = [s["detail"] for s in books.stages() if s["name"] == "train"]
    state = checkpoints.committed(folder / "checkpoints")[-1].path / "trainer_state.json"
    rates = [e["learning_rate"] for e in json.loads(state.read_text())["log_history"]
             if "learning_rate" in e]  # fmt: skip
    assert 0 < detail["steps"] < 100_000
    assert rates[-1] < max(rates)


# -- the signals themselves -----------------------------------------------------------------------

_STUCK = """
import sys, time
from thrifty import stop_signals
with stop_signals.heeded(lambda reason: stop_signals.tell(f"stop: {reason}")):
    stop_signals.tell("begun")
    while True:
        time.sleep(60)
"""


def test_the_same_wish_counts_once_and_a_later_ctrl_c_leaves():
    process = start_anew("-c", _STUCK)
    process.hear("begun")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send(number)
        process.hear("stop: interrupted by SIGTERM")
    assert process.said.count("stop:") == 1
    time.sleep(stop_signals.SAME_SECONDS + 0.2)
    process.send(signal.SIGINT)
    assert process.ended() == 5
    assert "left at once" in process.said


_CATCHING = """
import sys, time
from thrifty.cli import _interrupt
from thrifty import stop_signals
stop_signals.INSIST_SECONDS = 1.5
with stop_signals.heeded(_interrupt):
    try:
        stop_signals.tell("begun")
        time.sleep(60)
    except BaseException as caught:
        stop_signals.tell(f"caught: {caught}")
    time.sleep(60)
"""


def test_a_wish_that_a_library_caught_is_told_again():
    process = start_anew("-c", _CATCHING)
    process.hear("begun")
    process.send(signal.SIGUSR1)
    process.hear("caught: interrupted by SIGUSR1")
    assert process.ended(20) != 0
    assert "KeyboardInterrupt: interrupted by SIGUSR1" in process.said


def test_what_nohup_ignores_stays_ignored():
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = start_anew("-c", ignoring + _STUCK)
    process.hear("begun")
    process.send(signal.SIGHUP)
    process.send(signal.SIGUSR1)
    process.hear("stop: interrupted by SIGUSR1")
    assert process.said.count("stop:") == 1
    process.kill()
    assert process.ended() == -signal.SIGKILL
