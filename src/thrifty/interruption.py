"""A signal in training, or a job's end that comes near: the step is finished and saved, and the run
can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty import deadline, rank_watch, ranks, stop_signals

_MARGIN = 1.5
"""Of what a step, an evaluation and a save took, so much must be left for the next ones."""
_SAVED_BYTES_PER_SECOND = 100e6
"""Until a save was measured."""


class Interrupted(RuntimeError):
    """A signal, or the job's end, ended training after a finished step; the run can be resumed."""


class PauseCallback(TrainerCallback):
    """Ends training after the present step, saved, when a signal asked for it, where the job's end
    leaves no time for another, or where a pause was planned."""

    def __init__(self, at: int | None = None) -> None:
        self.asked = False
        self.reason = ""
        self.step = 0
        """The last that is finished."""
        self._at = at
        self._began = False
        self._deadline = deadline.of_slurm()
        self._pace = _Pace()

    def ask(self, reason: str) -> None:
        """To end after this step; at once while what comes before the first is not done."""
        if ranks.rank():
            return  # rank 0 hears of it (``rank_watch.py``), and decides for all
        if not self._began:
            raise KeyboardInterrupt(reason)
        if not self.asked:
            self.asked, self.reason = True, reason
            stop_signals.tell("finishing the step, then saving ...")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = True
        if not self.step:
            self._pace.mark()
        rank_watch.step_begins()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        rank_watch.step_ends()
        self.step = state.global_step
        self._pace.step()
        if self._deadline is not None:
            evaluates = (self.step + 1) % max(int(args.eval_steps or 0), 1) == 0
            needed = self._pace.next_step(evaluates, lambda: _bytes_of(model, optimizer))
            if self._deadline.left < needed + deadline.LEAVING_SECONDS:
                self.ask(f"{self._deadline}, too soon for another step and a save: {needed:.1f} s")
        if self.asked or self.step == self._at:
            self._end(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._pace.evaluate()
        if self.asked and self._began:
            self._end(control)
        self._began = True  # what was measured before the first step is worth that step, saved

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._pace.save()

    def _end(self, control: TrainerControl) -> None:
        if not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True


class _Pace:
    """Seconds that a step, an evaluation and a save take, the time between them included."""

    def __init__(self) -> None:
        self._step = self._evaluation = 0.0
        self._save: float | None = None
        self._marked = time.monotonic()

    def mark(self) -> float:
        """Seconds since the last mark."""
        before, self._marked = self._marked, time.monotonic()
        return self._marked - before

    def step(self) -> None:
        # The longest, fading: the first one may be slow for reasons of its own.
        self._step = max(self.mark(), 0.9 * self._step)

    def evaluate(self) -> None:
        self._evaluation = self.mark()

    def save(self) -> None:
        self._save = self.mark()

    def next_step(self, evaluates: bool, num_bytes: Any) -> float:
        """That another step, its evaluation if it has one, and a save take, with a margin."""
        if self._save is None:
            self._save = num_bytes() / _SAVED_BYTES_PER_SECOND
        return _MARGIN * (self._step + evaluates * self._evaluation + self._save)


def _bytes_of(model: Any, optimizer: Any) -> float:
    """Of what is saved: the trained parameters, and what the optimizer keeps."""
    states = getattr(optimizer, "state", {}).values()
    kept = [value for state in states for value in state.values() if torch.is_tensor(value)]
    trained = [each for each in model.parameters() if each.requires_grad]
    return float(sum(each.numel() * each.element_size() for each in [*trained, *kept]))


@contextmanager
def signals_asking(pause: PauseCallback) -> Iterator[None]:
    """Signals ask ``pause``; a second SIGINT leaves at once. Raises Interrupted at the end of the
    block, on rank 0, where it was asked: the run is not to go on to its next stage."""
    with stop_signals.heeded(pause.ask, saves=True):
        if reason := stop_signals.asked():  # in a training that began anew since
            pause.ask(reason)
        yield
    if pause.asked and ranks.rank() == 0:
        why = f": {pause.reason}" if pause.reason else ""
        raise Interrupted(
            f"stopped after step {pause.step}, which is saved{why}\n"
            "hint: the same command goes on from there"
        )
