"""A signal in training: the step is finished and saved, and the run can be gone on with."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interrupted(RuntimeError):
    """A signal ended training after a finished step; the run can be resumed."""


class PauseCallback(TrainerCallback):
    """Ends training after the present step, saved, when a signal asked for it, or where a pause
    was planned."""

    def __init__(self, at: int | None = None) -> None:
        self.asked = False
        self._at = at

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if (self.asked or state.global_step == self._at) and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def signals_asking(pause: PauseCallback) -> Iterator[None]:
    """SIGINT and SIGTERM finish the step and save; a second SIGINT leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals cannot be handled elsewhere; the caller's own handling stands
        return

    def ask(number: int, frame: Any) -> None:
        if pause.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        pause.asked = True
        print("finishing the step, then saving ...", file=sys.stderr, flush=True)

    names = [signal.SIGINT, signal.SIGTERM]
    before = {name: signal.signal(name, ask) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
