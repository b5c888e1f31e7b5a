"""A training whose rows are chosen anew on the way: what it tells the one who chooses, and what
follows from a choice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty import ranks
from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.core.contracts import Models
from thrifty.core.ledger import Lease, Stage
from thrifty.governor import Governor
from thrifty.held import PACKING_FILL
from thrifty.refresh import Outlook
from thrifty.signals.models import ModelInTraining
from thrifty.training_job import TrainingJob


def go_on(job: TrainingJob, step: int) -> None:
    """Have ``job`` read the rows that its rounds say were chosen by ``step``."""
    if job.rounds.leg_of is not None:
        job.data.restore(job.rounds.tokens, job.rounds.cuts)
    if job.refresher is not None:
        job.refresher.restore(job.rounds.legs, _tokens_by(job, step))


def _tokens_by(job: TrainingJob, step: int) -> float:
    """Trained on until then, of the rows that are chosen."""
    training = job.training
    packs = step * training.step_sequences * training.max_length
    return packs * PACKING_FILL * (1 - training.replay_share)


@dataclass(frozen=True)
class Refreshing:
    """The training of ``job``, by ``governor`` and ``budget``; ``steps_left(step)`` tells how many
    steps are still to come."""

    job: TrainingJob
    stage: Stage
    governor: Governor
    budget: BudgetCallback
    steps_left: Callable[[int], float]

    def after_evaluation(self, step: int, model: Any) -> None:
        """Have the rows chosen anew where that is worth it; from the next batch that is read on,
        training is on the new ones. ``model``: as it is by now."""
        rounds, data = self.job.rounds, self.job.data
        if rounds.leg_of is None:
            return
        # Rank 0 looks, the others wait for what it chose.
        ids = ranks.rows_of_rank_0(self._chosen_anew(step, model))
        if ids is None:
            return
        item = ranks.most(data.num_read)
        if item:
            data.members(item - 1)  # that all ranks have come to the same round
        rounds.begin_leg(ids, item)
        rounds.take_back(data.begin_anew(rounds.tokens, item))
        self.job.say(f"step {step:>5}  rows chosen anew: {len(ids):,}")

    def _chosen_anew(self, step: int, model: Any) -> NDArray[np.int64] | None:
        refresher = self.job.refresher
        if refresher is None or self.governor.is_cooling(step) or self.governor.is_over(step):
            return None
        models = ModelInTraining(model, self.job.yardstick.shape)
        return refresher.consider(step, self._running(step, models), self._outlook(step))

    def _running(self, step: int, models: Models) -> _Running:
        return _Running(self.stage, models, self.budget, step)

    def _outlook(self, step: int) -> Outlook:
        left = self.budget.step_cost() * max(self.steps_left(step), 0.0)
        own = 1 - self.job.training.replay_share
        return Outlook(
            tokens_left=left.tokens * PACKING_FILL * own,
            tokens_given=_tokens_by(self.job, step),
            drawn=self.job.rounds.drawn,
            firsts=self.job.rounds.firsts,
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
