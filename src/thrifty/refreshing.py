"""A training whose rows are chosen anew on the way: what it tells the one who chooses, and what
follows from a choice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.core.contracts import Models
from thrifty.core.ledger import Lease, Stage
from thrifty.governor import Governor
from thrifty.held import PACKING_FILL
from thrifty.refresh import Outlook
from thrifty.training_job import TrainingJob


@dataclass(frozen=True)
class Refreshing:
    """The training of ``job``, by ``governor`` and ``budget``; ``steps_left(step)`` tells how many
    steps are still to come."""

    job: TrainingJob
    stage: Stage
    governor: Governor
    budget: BudgetCallback
    steps_left: Callable[[int], float]

    def after_evaluation(self, step: int, models: Models) -> None:
        """Have the rows chosen anew where that is worth it; from the next batch that is read on,
        training is on the new ones. ``models``: as they are by now."""
        refresher, rounds, data = self.job.refresher, self.job.rounds, self.job.data
        if refresher is None or self.governor.is_cooling(step) or self.governor.is_over(step):
            return
        ids = refresher.consider(step, self._running(step, models), self._outlook(step))
        if ids is None:
            return
        rounds.begin_leg(ids, data.num_read)
        rounds.take_back(data.begin_anew(rounds.tokens))
        self.job.say(f"step {step:>5}  rows chosen anew: {len(ids):,}")

    def _running(self, step: int, models: Models) -> _Running:
        return _Running(self.stage, models, self.budget, step)

    def _outlook(self, step: int) -> Outlook:
        left = self.budget.step_cost() * max(self.steps_left(step), 0.0)
        return Outlook(
            tokens_left=left.tokens * PACKING_FILL,
            tokens_given=self.job.rounds.tokens_given,
            drawn=self.job.rounds.drawn,
            prospect=self.governor.prospect(left),
        )


@dataclass(frozen=True)
class _Running:
    """``refresh.Running``."""

    stage: Stage
    models: Any
    budget: BudgetCallback
    step: int

    def spending(self, name: str, upper: Cost) -> AbstractContextManager[Lease]:
        return self.budget.activity(name, self.stage.ledger.rates.of(upper), step=self.step)

    def allows(self, upper: Cost) -> bool:
        return self.budget.allows(self.stage.ledger.rates.of(upper), self.step)
