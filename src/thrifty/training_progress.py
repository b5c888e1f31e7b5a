"""How far training has come, between evaluations: a bar on a terminal, elsewhere a rare line."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty.core import quantities
from thrifty.progress import Pace

_LINE_SECONDS = 30.0
_BAR_SECONDS = 0.5
_TIMED_STEPS = 50
"""The latest, of which the pace is told."""


class TrainingProgress(TrainerCallback):
    """Says steps, steps a second, training loss and time left. ``steps_left(step)`` tells how many
    steps are still to come, as far as is known at ``step``."""

    def __init__(self, say: Callable[[str], None], steps_left: Callable[[int], float]) -> None:
        self._say = say
        self._steps_left = steps_left
        self._pace = Pace(_LINE_SECONDS)
        self._seconds: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._began = 0.0
        self._loss: float | None = None
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._pace.begin()
        if sys.stderr.isatty():
            self._pace = Pace(_BAR_SECONDS, rarer=0.0)
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=30),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                redirect_stdout=False,  # results go there
                refresh_per_second=2,
                transient=True,
            )
            self._bar.add_task("starting", total=None)
            self._bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._seconds.append(time.monotonic() - self._began)
        if self._pace.due():
            self._tell(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._pace.said()  # an evaluation is a line already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Clear the bar; harmless to call again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tell(self, step: int) -> None:
        seconds = sum(self._seconds) / len(self._seconds)
        left = max(int(self._steps_left(step)), 0)
        parts = [f"step {step:,} of about {step + left:,}", f"{_pace(seconds)}"]
        if self._loss is not None:
            parts.append(f"train loss {self._loss:.4f}")
        parts.append(f"about {quantities.format_seconds(left * seconds)} left")
        text = ", ".join(parts)
        if self._bar is None:
            self._say(f"  {text}")
        else:
            self._bar.update(
                self._bar.task_ids[0], description=text, completed=step, total=step + left
            )


def _pace(seconds: float) -> str:
    """Of a step: steps a second, or of slow ones seconds a step."""
    return f"{1 / max(seconds, 1e-9):.3g} steps/s" if seconds < 1 else f"{seconds:.3g} s a step"
