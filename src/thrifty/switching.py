"""A training whose steps may be held otherwise from some evaluation on: what it tells the one who
weighs that."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.core.ledger import Stage
from thrifty.costs.shape import read_shape
from thrifty.governor import Governor
from thrifty.memory_switch import Holding, Standing, new_states, switches
from thrifty.schedule import WarmupStableDecay
from thrifty.training_job import TrainingJob
from thrifty.training_phase import turning_cost


@dataclass(frozen=True)
class Switching:
    """The training of ``job``, by ``governor``, ``budget`` and ``schedule``."""

    job: TrainingJob
    stage: Stage
    governor: Governor
    budget: BudgetCallback
    schedule: WarmupStableDecay

    def after_evaluation(self, step: int) -> Holding | None:
        """How the steps are to be held from here on, by a trainer of their own that begins with the
        checkpoint to be left now; None: as they are."""
        job = self.job
        if job.switch is None or job.holding is None or step == 0 or self.governor.is_cooling(step):
            return None
        now, seen = job.holding, self.budget.step_cost()
        # Where blocks take turns, the last few steps are of one or two of them.
        round_it = now.step.flops / seen.flops if now.cycle_steps > 1 and seen.flops else 1.0
        standing = Standing(
            step=step,
            now=now,
            measured=replace(seen * round_it, peak_memory_bytes=self._peak(step)),
            schedule_steps=float(self.schedule.end - step),
            budget_steps=self.budget.steps_left(step) / round_it,
            transition=lambda other: self._transition(now, other, step),
            prospect=None,
        )
        left = seen * round_it * standing.steps_left
        standing = replace(standing, prospect=self.governor.prospect(left))
        found = job.switch.consider(standing, self.stage)
        if found is not None:
            job.say(f"step {step:>5}  steps are held as {found.name} from here on")
            if not found.trains_as(now):
                job.say(f"  {new_states(now, found)}")
        return found

    def _peak(self, step: int) -> float:
        """Of the training as it is held now."""
        since = max(switches(self.stage, step), default=0)
        return max(
            (
                charge["peak_memory_bytes"]
                for charge in self.stage.ledger.charges()
                if charge["stage_id"] == self.stage.id
                and charge["activity"] == "train"
                and charge["step_from"] >= since
            ),
            default=0.0,
        )

    def _transition(self, now: Holding, other: Holding, step: int) -> Cost | None:
        cost = self.governor.checkpoint_cost() + self.job.predicted_load
        if other.trains_as(now):
            return cost
        whole = turning_cost(read_shape(self.job.base), now.setting, self.job.predicted_load)
        cost += self.stage.ledger.rates.of(whole)
        return cost if self.budget.allows(cost, step) else None
