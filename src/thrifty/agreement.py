"""All ranks go on as rank 0 does: it alone knows what is spent, decided, and asked by a signal."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty import ranks
from thrifty.schedule import WarmupStableDecay

_FLAGS = ("should_training_stop", "should_evaluate", "should_save", "should_log")


class AgreeingCallback(TrainerCallback):
    """After each step, once all others have said what they want."""

    def __init__(self, schedule: WarmupStableDecay) -> None:
        self._schedule = schedule

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        self.agree(control, lr_scheduler, state.global_step)

    on_train_begin = on_step_end
    """A cool-down may have begun before an interruption."""

    def agree(self, control: TrainerControl, scheduler: Any, step: int) -> None:
        """Take over rank 0's ``control``, and when it cools down."""
        if ranks.world() == 1:
            return
        own = [int(getattr(control, name)) for name in _FLAGS]
        *flags, start = ranks.of_rank_0([*own, self._schedule.cooldown_start])
        for name, flag in zip(_FLAGS, flags, strict=True):
            setattr(control, name, bool(flag))
        if start != self._schedule.cooldown_start:
            self._schedule.cooldown_start = start
            self._schedule.set_rate(scheduler, step)
