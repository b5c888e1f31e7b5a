"""Lines that say how far it has come: none at first, then ever rarer; on a terminal a bar."""

from __future__ import annotations

import io
import sys
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from thrifty.progress import Pace, counted
from thrifty.training_progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when told to."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def test_lines_grow_rarer(clock):
    pace, said = Pace(3.0), []
    for second in range(2000):
        clock.seconds = 1000.0 + second
        if pace.due():
            said.append(second)
    assert said[:4] == [3, 6, 9, 12]
    assert len(said) < 40
    assert all(later - earlier >= 0.2 * earlier for earlier, later in pairwise(said))


def test_rows_are_counted_and_come_through(clock):
    said: list[str] = []

    def slow():
        for n in range(640):
            clock.seconds += 0.02
            yield n

    assert list(counted(slow(), said.append)) == list(range(640))
    assert said[0] == "  192 rows read and tokenised, 50 a second"
    assert 2 <= len(said) <= 4


def test_few_rows_say_nothing():
    said: list[str] = []
    assert list(counted(range(1000), said.append)) == list(range(1000))
    assert list(counted([], said.append)) == []
    assert said == []


def steps(told: TrainingProgress, clock: SimpleNamespace, count: int, seconds: float) -> None:
    state: Any = SimpleNamespace(global_step=0)
    nothing: Any = None
    told.on_train_begin(nothing, state, nothing)
    for step in range(1, count + 1):
        told.on_step_begin(nothing, state, nothing)
        clock.seconds += seconds
        state.global_step = step
        told.on_step_end(nothing, state, nothing)
        if step % 5 == 0:
            told.on_log(nothing, state, nothing, logs={"loss": 3.0 - 0.01 * step})
    told.on_train_end(nothing, state, nothing)


def test_rare_lines_where_there_is_no_terminal(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    said: list[str] = []
    steps(TrainingProgress(said.append, lambda step: 100 - step), clock, 90, 2.0)
    assert said[0] == ("  step 15 of about 100, 2 s a step, train loss 2.9000, about 2m50s left")
    assert len(said) <= 180 / 30


def test_a_short_run_says_nothing_between_evaluations(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    said: list[str] = []
    steps(TrainingProgress(said.append, lambda step: 100 - step), clock, 90, 0.1)
    assert said == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("thrifty.training_progress._BAR_SECONDS", 0.0)
    said: list[str] = []
    told = TrainingProgress(said.append, lambda step: 10 - step)
    steps(told, SimpleNamespace(seconds=0.0), 10, 0.0)
    assert said == []
    assert "step 10 of about 10" in screen.getvalue()
    assert sys.stderr is screen, "it gave standard error back"
    told.close()  # harmless again
