"""Reporters that raise, hang, leave or flood never touch the run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from tests.runs import finish, interrupt_at, planned, weights
from thrifty import reporters, training
from thrifty.reporters import Fenced

REPORTERS = Path(__file__).with_name("bad_reporters.py")


def state(step: int) -> TrainerState:
    return TrainerState(global_step=step, log_history=[{"step": each} for each in range(step)])


def told(fenced: Fenced, name: str, step: int = 0, **given) -> None:
    getattr(fenced, name)(SimpleNamespace(seed=1), state(step), TrainerControl(), **given)


class Recording(TrainerCallback):
    """Writes down what it is told, once it may."""

    def __init__(self, may: threading.Event | None = None) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()
        self.may = may

    def _see(self, name: str, state: TrainerState) -> None:
        assert self.may is None or self.may.wait(20)
        self.threads.add(threading.get_ident())
        self.seen.append((name, state.global_step, len(state.log_history)))

    def on_train_begin(self, args, state, control, **kwargs):
        self._see("begin", state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._see("log", state)

    def on_train_end(self, args, state, control, **kwargs):
        self._see("end", state)


def test_events_arrive_in_order_on_one_other_thread_and_all_before_training_ends():
    said: list[str] = []
    inner = Recording()
    fenced = Fenced(inner, said.append)
    told(fenced, "on_train_begin")
    for step in range(1, 200):
        told(fenced, "on_log", step)
    told(fenced, "on_train_end", 200)
    assert inner.seen == [
        ("begin", 0, 0),
        *(("log", step, step) for step in range(1, 200)),
        ("end", 200, 200),
    ]
    assert len(inner.threads) == 1
    assert threading.get_ident() not in inner.threads
    assert said == []


def test_what_a_reporter_sees_is_as_it_was_and_what_it_changes_is_its_own():
    may, seen = threading.Event(), []

    class Meddling(TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            assert may.wait(20)
            seen.append((state.global_step, list(state.log_history), dict(logs), sorted(kwargs)))
            args.seed = state.max_steps = 7
            state.log_history.clear()
            logs["loss"] = 0.0
            control.should_training_stop = True
            return control

    fenced = Fenced(Meddling(), pytest.fail)
    args, now, control = SimpleNamespace(seed=1), state(3), TrainerControl()
    logs, others = {"loss": 2.0}, {"optimizer": object(), "train_dataloader": object()}
    assert fenced.on_log(args, now, control, logs=logs, model="model", **others) is None
    now.global_step = 4
    now.log_history.append({"step": 3})
    may.set()
    told(fenced, "on_train_end")  # which this one does nothing at
    assert seen == [(3, [{"step": 0}, {"step": 1}, {"step": 2}], {"loss": 2.0}, [])]
    assert (args.seed, logs, control.should_training_stop) == (1, {"loss": 2.0}, False)
    assert len(now.log_history) == 4
    assert now.max_steps == 0


@pytest.mark.parametrize(
    "error", [ConnectionError("no network"), SystemExit(3), KeyboardInterrupt(), MemoryError()]
)
def test_what_it_raises_is_said_and_it_is_told_the_rest(error):
    class Broken(Recording):
        def on_log(self, *args, **kwargs):
            raise error

    said, noted = [], []
    inner = Broken()
    fenced = Fenced(inner, said.append, noted.append)
    told(fenced, "on_log", 1)
    told(fenced, "on_log", 2)
    told(fenced, "on_train_end", 3)
    assert inner.seen == [("end", 3, 3)]
    line = f"reporting degraded: Broken raised {error!r}; it raised 2 times"
    assert said[-1] == line
    assert noted == [line]


def test_one_that_hangs_is_left_behind_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(reporters, "HUNG_SECONDS", 0.2)
    monkeypatch.setattr(reporters, "MOST_WAITING", 5)
    never = threading.Event()

    class Hanging(TrainerCallback):
        def on_log(self, *args, **kwargs):
            never.wait(60)

    said: list[str] = []
    inner = Recording()
    hanging, sound = Fenced(Hanging(), said.append), Fenced(inner, said.append)
    began = time.monotonic()
    for step in range(50):
        for fenced in (hanging, sound):
            told(fenced, "on_log", step)
        time.sleep(0.001)
    assert time.monotonic() - began < 5
    for fenced in (sound, hanging):
        told(fenced, "on_train_end", 50)
    never.set()
    assert len(inner.seen) >= 51 - 45
    assert any("Hanging has been at on_log for 0 s, and is not waited for" in line for line in said)
    assert said[-1].startswith("reporting degraded: Hanging")
    assert said[-1].endswith("50 of 50 events were not reported")


def test_an_event_that_a_reporter_ignores_costs_nothing(monkeypatch):
    fenced = Fenced(Recording(), pytest.fail)
    told(fenced, "on_step_end")
    assert fenced._thread is None


# -- in a run -----------------------------------------------------------------------------------


def register(monkeypatch, reporter: type[TrainerCallback]) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "bad", reporter)


@pytest.mark.long
def test_training_under_a_reporter_that_hangs_and_meddles_is_the_same(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(reporters, "HUNG_SECONDS", 0.5)
    never = threading.Event()

    class Bad(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            control.should_training_stop = True
            state.global_step = 10**6
            never.wait(60)

    plain, bad = tmp_path / "plain", tmp_path / "bad"
    planned(plain, tiny_model, tiny_data)
    shutil.copytree(plain, bad)
    finish(plain)
    register(monkeypatch, Bad)
    plan = bad / "plan.yaml"
    plan.write_text(plan.read_text().replace("report_to: []", "report_to: [bad]"))
    said: list[str] = []
    with monkeypatch.context() as patch:  # and goes on the same after an interruption
        interrupt_at(patch, 7)
        with pytest.raises(training.Interrupted):
            finish(bad, said.append)
    finish(bad, said.append)
    never.set()
    assert sum("reporting degraded: Bad" in line for line in said) >= 2
    same = weights(plain / "model")
    assert all((same[name] == weight).all() for name, weight in weights(bad / "model").items())


@pytest.fixture(scope="module")
def plain(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A run that no reporter was told of, and the same one planned."""
    home = tmp_path_factory.mktemp("reported")
    planned(home / "planned", tiny_model, tiny_data)
    shutil.copytree(home / "planned", home / "run")
    finish(home / "run")
    return home


SAID = {
    "Raises": "reporting degraded: Raises raised ConnectionError('no network'); it raised ",
    "Exits": "reporting degraded: Exits raised SystemExit(7)",
    "Interrupts": "reporting degraded: Interrupts raised KeyboardInterrupt()",
    "Hangs": "reporting degraded: Hangs has been at on_train_begin for ",
    "Floods": "reporting degraded: Floods has been at on_train_end for ",
    "Meddles": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAID)
def test_the_command_line_under_a_bad_reporter(kind, plain, tmp_path):
    folder = shutil.copytree(plain / "planned", tmp_path / "run")
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, REPORTERS, kind, "run", folder],
        capture_output=True, text=True, timeout=220, check=False,
    )  # fmt: skip
    print(f"{kind}: {time.monotonic() - began:.1f} s, {len(ended.stderr):,} characters of talk")
    lines = [line for line in ended.stderr.splitlines() if line[:1] not in ("x", "y")]
    assert ended.returncode == 0, lines[-20:]
    degraded = [line for line in lines if line.startswith("reporting degraded")]
    assert degraded[-1:] == [line for line in degraded[-1:] if line.startswith(SAID[kind])]
    assert bool(degraded) == bool(SAID[kind])
    same = weights(plain / "run" / "model")
    assert all((same[name] == weight).all() for name, weight in weights(folder / "model").items())
