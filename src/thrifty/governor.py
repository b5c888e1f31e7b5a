"""The closed loop over the one rule: after every dev evaluation, train on or cool down and stop.

First version: one run, one choice of data. The stopping rule (``stopping/``) weighs the forecast
gain of the next interval against the price of what remains; every verdict goes to the ledger with
its numbers. Any end, the budget's included, goes through the cool-down that the plan reserved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation, Outlook, StoppingRule
from thrifty.core.ledger import Stage
from thrifty.core.plan import Objective
from thrifty.schedule import WarmupStableDecay


class Governor:
    """Decides how a run of training ends. Its history is the ledger's, so that it survives a
    resume and forgets what a rollback undid."""

    def __init__(
        self,
        rule: StoppingRule,
        schedule: WarmupStableDecay,
        stage: Stage,
        *,
        objective: Objective,
        step_cost: Callable[[], Cost],
        evaluation_cost: Callable[[], Cost],
        checkpoint_cost: Callable[[], Cost],
        reserved: Callable[[], Cost],
        eval_steps: int,
    ) -> None:
        self._rule = rule
        self._schedule = schedule
        self._stage = stage
        self._objective = objective
        self._step_cost = step_cost
        self._evaluation_cost = evaluation_cost
        self._checkpoint_cost = checkpoint_cost
        self._reserved = reserved
        self._eval_steps = eval_steps
        self._cut = False
        self.scheduler: Any = None
        """The trainer's, once it has one: an early cool-down takes effect at once."""

    # -- how the run ends (asked by BudgetCallback) ----------------------------------------------

    def tail(self, step: int) -> tuple[int, Cost]:
        """Every evaluation and checkpoint to come is in it, this step's and the last one's."""
        cooling = self.is_cooling(step)
        end = self._schedule.end if cooling else step + 1 + self._schedule.cooldown_steps
        every = self._eval_steps
        times = max(end // every - step // every, 0) + (end % every != 0)
        if step % every == 0 and not self._has_evaluated(step):
            times += 1
        watching = (self._evaluation_cost() + self._checkpoint_cost()) * times
        return max(end - step - (not cooling), 0), watching + self._reserved()

    def _has_evaluated(self, step: int) -> bool:
        history = self.history()
        return bool(history) and history[-1].step >= step

    def is_cooling(self, step: int) -> bool:
        return step >= self._schedule.cooldown_start

    def is_over(self, step: int) -> bool:
        return self._cut or step >= self._schedule.end

    def end_run(self, step: int, reason: str) -> None:
        if self.is_cooling(step):
            return
        self._schedule.cool_down_from(step, self.scheduler)
        self._stage.decide("train on or stop", "cool down and stop", reason, step=step)

    def cut_short(self, step: int, reason: str) -> None:
        self._cut = True
        self._stage.decide("train on or stop", "stop now", reason, step=step)

    # -- after an evaluation ---------------------------------------------------------------------

    def history(self) -> list[Evaluation]:
        rows = self._stage.ledger.evaluations(account=self._stage.account)
        return [
            Evaluation(
                step=row["step"], flops=row["flops"], loss=row["objective"], stderr=row["stderr"]
            )
            for row in rows
            if row["stage_id"] == self._stage.id
        ]

    def weigh(self, step: int) -> None:
        """Ask the rule, write down its verdict, and begin the cool-down where it says stop."""
        if self.is_cooling(step):
            return
        interval = self._step_cost() * self._eval_steps + self._evaluation_cost()
        left = self._stage.budget.left(self._stage.spent())
        resource, _ = self._stage.budget.binding(self._stage.spent(), interval)
        resource = resource or "flops"
        outlook = Outlook(
            resource=resource,
            next_interval=interval,
            remaining=Cost(**{name: max(amount, 0.0) for name, amount in left.items()}),
            price=self._price(resource, interval),
            unit=self._objective.unit,
        )
        verdict = self._rule.decide(self.history(), outlook)
        chosen = "cool down and stop" if verdict.stop else "train on"
        self._stage.decide(
            "train on or stop",
            chosen,
            verdict.reason,
            choice=verdict.choice,
            detail=None if verdict.forecast is None else {"forecast": asdict(verdict.forecast)},
            step=step,
        )
        if verdict.stop:
            self._schedule.cool_down_from(step, self.scheduler)

    def _price(self, resource: str, interval: Cost) -> float:
        """Objective units that a unit of ``resource`` would buy elsewhere: the user's value of a
        gain in dollars, or zero, for with a fixed model and nothing else to do there is no
        alternative use."""
        value = self._objective.dollars_per_unit
        if value is None:
            return 0.0
        priced = self._stage.ledger.rates.of(replace(interval, dollars=0.0))
        amount = priced.of(resource)
        if priced.dollars is None or not amount:
            return 0.0
        return priced.dollars / value / amount
