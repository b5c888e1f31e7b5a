"""Training whose trained part changes from step to step, kept in step with what is charged."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty.budget_callback import BudgetCallback
from thrifty.core.contracts import Trainable
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


class TurnCallback(TrainerCallback):
    """Before each step has ``trained`` turn the model to what is trained in it, and ``budget``
    charge for that."""

    def __init__(
        self,
        trained: Trainable,
        shape: ModelShape,
        setting: MemorySetting,
        budget: BudgetCallback,
        seed: int,
    ) -> None:
        self._trained, self._shape, self._setting = trained, shape, setting
        self._budget, self._seed = budget, seed

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        step = state.global_step
        inner = getattr(optimizer, "optimizer", optimizer)
        self._trained.at_step(model, inner, step, self._seed)
        self._budget.charge_as(
            self._trained.setting_at(self._setting, self._shape, step, self._seed)
        )
