"""The closed loop over the one rule: after every dev evaluation, train on or cool down and stop.

First version: one run, one choice of data. The stopping rule (``stopping/``) compares two ends that
a run could have, cooled down now or an interval later, at the price of what remains; every verdict
goes to the ledger with its numbers, the forecast and the odds that a stop is wrong. Any end, the
budget's included, goes through the cool-down that the plan reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from math import inf
from typing import Any

from thrifty.core.budget import CONSUMED, Cost
from thrifty.core.contracts import Evaluation, Outlook, StoppingRule
from thrifty.core.ledger import Stage
from thrifty.core.marginal import Choice, Estimate
from thrifty.core.plan import Objective
from thrifty.own_units import in_unit
from thrifty.prospect import Prospect
from thrifty.sampling_price import SamplingPrice
from thrifty.scaling.curves import Forecast
from thrifty.scaling.endings import endings
from thrifty.schedule import WarmupStableDecay

DECISION = "train on or stop"
COOL_DOWN = "cool down and stop"


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
        self.checkpoint_cost = checkpoint_cost
        """Of the next one, an upper bound."""
        self._reserved = reserved
        self._eval_steps = eval_steps
        self._cut = False
        self._resume()
        self.scheduler: Any = None
        """The trainer's, once it has one: an early cool-down takes effect at once."""
        self.alternatives: tuple[Callable[[str, Cost], float], ...] = ()
        """Other uses of what remains: (resource, the next interval) -> what a unit of it would
        bring there. The frontier's ``abs(dL*/dC)``, where N and D are free, is one."""
        self.serving: SamplingPrice | None = None
        """Another, where the budget is to answer questions after training."""

    def _resume(self) -> None:
        """Go on with a cool-down that was begun before an interruption."""
        reached = max((evaluation.step for evaluation in self.history()), default=-1)
        decided = [
            row
            for row in self._stage.ledger.decisions()
            if row["stage_id"] == self._stage.id
            and row["name"] == DECISION
            and row["step"] <= reached
        ]
        if decided and decided[-1]["chosen"] == COOL_DOWN:
            self._schedule.cool_down_from(decided[-1]["step"])

    # -- how the run ends (asked by BudgetCallback) ----------------------------------------------

    def tail(self, step: int) -> tuple[int, Cost]:
        """Every evaluation and checkpoint to come is in it, this step's and the last one's."""
        cooling = self.is_cooling(step)
        end = self._schedule.end if cooling else step + 1 + self._schedule.cooldown_steps
        every = self._eval_steps
        times = max(end // every - step // every, 0) + (end % every != 0)
        if step % every == 0 and not self._has_evaluated(step):
            times += 1
        watching = (self._evaluation_cost() + self.checkpoint_cost()) * times
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
        seen = endings(self._weighed(), self._outlook(step))
        self._schedule.cool_down_from(step, self.scheduler)
        if seen is not None:
            reason += f"; an interval more would gain {seen.gain:.4f} ± {seen.gain_stderr:.4f}"
        self._decide(COOL_DOWN, reason, step, seen)

    def cut_short(self, step: int, reason: str) -> None:
        self._cut = True
        self._decide("stop now", reason, step)

    def _decide(
        self,
        chosen: str,
        reason: str,
        step: int,
        seen: Forecast | None = None,
        choice: Choice | None = None,
    ) -> None:
        detail: dict[str, Any] = {} if seen is None else {"forecast": asdict(seen)}
        if self.serving is not None and (told := self.serving.told(self._interval())):
            detail["serving"] = told
            reason += "; " + _as_samples(told)
        self._stage.decide(
            DECISION, chosen, reason, choice=choice, detail=detail or None, step=step
        )

    # -- after an evaluation ---------------------------------------------------------------------

    def history(self) -> list[Evaluation]:
        return [
            Evaluation(
                step=row["step"], flops=row["flops"], loss=row["objective"], stderr=row["stderr"]
            )
            for row in self.evaluations()
        ]

    def evaluations(self) -> list[dict[str, Any]]:
        """The run's own, as the ledger has them."""
        rows = self._stage.ledger.evaluations(account=self._stage.account)
        return [row for row in rows if row["stage_id"] == self._stage.id]

    def _weighed(self) -> list[Evaluation]:
        """The history that the rule judges by: of the votes, where it is votes that count."""
        return (self.serving and self.serving.history()) or self.history()

    def weigh(self, step: int) -> None:
        """Ask the rule, write down its verdict, and begin the cool-down where it says stop."""
        if self.is_cooling(step):
            return
        verdict = self._rule.decide(self._weighed(), self._outlook(step))
        chosen = COOL_DOWN if verdict.stop else "train on"
        self._decide(chosen, verdict.reason, step, verdict.forecast, verdict.choice)
        if verdict.stop:
            self._schedule.cool_down_from(step, self.scheduler)

    def prospect(self, left: Cost) -> Prospect | None:
        """What ``left``, that the budget still spends on steps, is forecast to bring; None where
        there are too few evaluations to tell."""
        spent = self._stage.spent()
        resource, _ = self._stage.budget.binding(spent, left)
        unit = self._objective.unit
        return Prospect.of(self.history(), spent, left, resource or "flops", unit)

    def flops_for_answers(self, step: int) -> float:
        """That would be left for answering questions, were training to cool down now."""
        left = self._stage.budget.left(self._stage.spent()).get("flops", inf)
        cooldown, after = self.tail(step)
        return left - cooldown * self._step_cost().flops - after.flops

    def _interval(self) -> Cost:
        return self._step_cost() * self._eval_steps + self._evaluation_cost()

    def _outlook(self, step: int) -> Outlook:
        interval = self._interval()
        spent = self._stage.spent()
        left = dict.fromkeys(CONSUMED, inf) | self._stage.budget.left(spent)
        resource, _ = self._stage.budget.binding(spent, interval)
        resource = resource or "flops"
        return Outlook(
            resource=resource,
            next_interval=interval,
            remaining=Cost(**{name: max(amount, 0.0) for name, amount in left.items()}),
            price=self._price(resource, interval),
            unit=self._objective.unit,
            scored=self._objective.answers is not None,
            spent=spent,
            schedule=self._schedule.shape,
            interval_steps=self._eval_steps,
            intervals_left=(self._schedule.cooldown_start - step) / self._eval_steps,
        )

    def in_own_unit(self, gain: Estimate) -> Estimate:
        """A gain as one of the objective, where it is in nats by the run's own map. Raises
        ValueError where its evaluations do not tell of one."""
        return in_unit(gain, self.evaluations(), self._objective.unit)

    def _price(self, resource: str, interval: Cost) -> float:
        """Objective units that a unit of ``resource`` would buy elsewhere, at best; zero where
        there is no alternative use."""
        serving = () if self.serving is None else (self.serving,)
        uses = (self._value, *self.alternatives, *serving)
        return max(price(resource, interval) for price in uses)

    def _value(self, resource: str, interval: Cost) -> float:
        """By what the user says that a gain is worth in dollars; zero where that is not said."""
        value = self._objective.dollars_per_unit
        if value is None:
            return 0.0
        priced = self._stage.ledger.rates.of(replace(interval, dollars=0.0))
        amount = priced.of(resource)
        if priced.dollars is None or not amount:
            return 0.0
        return priced.dollars / value / amount


def _as_samples(told: Mapping[str, Any]) -> str:
    return (
        f"what is left answers {told['questions']:,} questions with {told['samples']:.1f} samples "
        f"each, {told['accuracy']:.4f} of them right ({told['samples_after_interval']:.1f} and "
        f"{told['accuracy_after_interval']:.4f} with an interval less)"
    )
