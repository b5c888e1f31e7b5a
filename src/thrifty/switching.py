"""A training whose steps may be held otherwise from some evaluation on: what it tells the one who
weighs that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.core.ledger import Stage
from thrifty.governor import Governor
from thrifty.memory_switch import Holding
from thrifty.training_job import TrainingJob


@dataclass(frozen=True)
class Switching:
    """The training of ``job``, by ``governor`` and ``budget``; ``steps_left(step)`` tells how many
    steps are still to come, ``checkpoint()`` what leaving one takes."""

    job: TrainingJob
    stage: Stage
    governor: Governor
    budget: BudgetCallback
    steps_left: Callable[[int], float]
    checkpoint: Callable[[], Cost]

    def after_evaluation(self, step: int) -> Holding | None:
        """How the steps are to be held from here on, by a trainer of their own that begins with the
        checkpoint to be left now; None: as they are."""
        job, stage = self.job, self.stage
        if job.switch is None or job.holding is None or step == 0 or self.governor.is_cooling(step):
            return None
        each = self.budget.step_cost()
        peak = stage.ledger.spent(account=stage.account, activity="train").peak_memory_bytes
        left = each * max(self.steps_left(step), 0.0)
        found = job.switch.consider(
            step,
            job.holding,
            replace(each, peak_memory_bytes=peak),
            self.checkpoint() + job.predicted_load,
            self.governor.prospect(left),
            stage,
        )
        if found is not None:
            job.say(f"step {step:>5}  steps are held as {found.name} from here on")
        return found
