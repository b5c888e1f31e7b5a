"""The pilot: short trainings of the real model on what each candidate picks, before the run.

    RUN/pilot/pool/          the sample among whose rows all pick
    RUN/pilot/NAME/          a candidate's selection and checkpoints
    RUN/pilot/choice.yaml    the winner, and what it sets in plan.yaml: the run goes by it then

Planned by ``pilot_plan.py``. Each candidate is a stage "pilot" on the run's own account, all of
them together within the pilot's share of the budget. A candidate that stays on pauses at a rung's
end and goes on from its checkpoint on the next, at a constant learning rate. What ends a pilot too
early (its share spent, an interruption's losses included) leaves the choice to what was measured by
then, and to the first-named candidate where that is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from thrifty import disk_space, selection, stages, training
from thrifty.core import sums
from thrifty.core.budget import Budget, Cost
from thrifty.core.contracts import Evaluation, Outlook, Rows, Scorer, StoppingRule, Verdict
from thrifty.core.ledger import BudgetExceeded, Stage
from thrifty.core.marginal import Choice, Estimate
from thrifty.core.plan import Selection, Training
from thrifty.core.plan_pilot import PilotCandidate
from thrifty.core.resolve import resolve
from thrifty.data.store import Store
from thrifty.data.subset import drawn, subset
from thrifty.open_run import Branch, Work
from thrifty.pilot_gains import Trial, Z, gain_of, weigh
from thrifty.pilot_plan import part_of
from thrifty.predictions import setting_of
from thrifty.report.facts import PILOT as DECISION
from thrifty.scaling.halving import survivors
from thrifty.training_rows import asked_of

STAGE = "pilot"


def pilot(work: Work) -> None:
    """Find out which of the plan's candidates the rest of the budget should go to; nothing where
    the plan has no pilot, or where one was, or rows are chosen already."""
    plan = work.plan.pilot
    chosen = work.run.selected(work.main.folder) / selection.MANIFEST
    if not plan.share or not plan.rungs or work.run.pilot_file.is_file() or chosen.is_file():
        return
    names = ", ".join(each.name for each in plan.candidates)
    work.say(f"pilot: {names}, on at most {plan.share:.0%} of the budget")
    run = _Pilot(work)
    with disk_space.room(work.run.path, "piloting", run.disk_needs):
        run.run()
    choice = run.choose()
    winner = run.by_name[choice.chosen or plan.candidates[0].name]
    record = {"chosen": winner.name, "reason": choice.reason, "settings": dict(winner.settings)}
    weighed = choice if choice.options else None  # else nothing was measured
    work.ledger.decide(DECISION, winner.name, choice.reason, choice=weighed, detail=run.detail())
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    sums.write(work.run.pilot_file, text)
    work.say(f"pilot: {winner.name} ({choice.reason})")
    work.follow_pilot()


@dataclass(frozen=True)
class _Onward(StoppingRule):
    """A short training goes on to the end of its rung."""

    source = "a pilot ends by its rungs"

    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict:
        return Verdict(stop=False, reason="to the end of the rung")


class _Pilot:
    """One pilot at work."""

    def __init__(self, work: Work) -> None:
        self.work, self.plan = work, work.plan.pilot
        self.by_name = {each.name: each for each in self.plan.candidates}
        self.limit: Budget = part_of(work.plan.budget, self.plan.share)
        self.until: dict[str, int] = {}
        """Name -> the step to which its last rung went."""
        self.ended = ""
        """Why the pilot ended early."""

    def run(self) -> None:
        """All rungs, or as many as the pilot's share pays for."""
        left = list(self.plan.candidates)
        sizes = [rung.candidates for rung in self.plan.rungs[1:]] + [1]
        try:
            for number, (rung, keep) in enumerate(zip(self.plan.rungs, sizes, strict=True), 1):
                for each in left:
                    self._advance(each, rung.steps)
                    self.until[each.name] = rung.steps
                left = self._survivors(left, keep)
                if len(left) == 1:
                    break
                names = ", ".join(each.name for each in left)
                self.work.say(f"pilot: after rung {number}, {names} remain")
        except BudgetExceeded as refusal:
            self.ended = str(refusal).partition("\n")[0]
            self.work.say(f"pilot: ends early: {self.ended}")

    def disk_needs(self) -> tuple[float, str]:
        """Of what is still to be done."""
        work, training = self.work, self._training
        return disk_space.pilot_needs(
            self.plan,
            {each.name: self._branch(each).plan for each in self.plan.candidates},
            work.pool,
            work.shape,
            setting_of(training, work.shape, work.device),
            work.base,
            work.run.pilot,
        )

    def _survivors(self, left: Sequence[PilotCandidate], keep: int) -> list[PilotCandidate]:
        """Those of whom nothing is known yet are out."""
        known = [(each, gain) for each in left if (gain := self._gain(each)) is not None]
        if not known:
            return list(left[:keep])
        places = survivors([gain for _, gain in known], keep, Z)
        return [known[place][0] for place in places]

    # -- a candidate ------------------------------------------------------------------------------

    def _advance(self, candidate: PilotCandidate, steps: int) -> None:
        """Choose its rows, where that is not done, and train on them until ``steps``."""
        work, branch = self.work, self._branch(candidate)
        with work.ledger.stage(
            STAGE,
            candidate.name,
            predicted=work.planned(STAGE) * (1 / len(self.by_name)),
            limit=self.limit,
            reopen=True,
        ) as stage:
            self._select(candidate, branch, stage)
            job = stages.training_job(work, branch, stage, Cost())
            work.models.release()  # training loads its own
            job = replace(job, rule=_Onward(), reserved=Cost(), pause_at=steps)
            if rows := work.rows("pilot"):
                job = replace(job, dev=rows, predicted_evaluation=self._evaluation(job, rows))
            work.say(f"  {candidate.name}: training until step {steps}")
            training.train(job, stage)

    @staticmethod
    def _evaluation(job: training.TrainingJob, rows: Mapping[str, Rows]) -> Cost:
        """Of rows of its own, where the job's is of the dev rows."""
        flops = job.yardstick.flops(rows, guarded=True)
        share = flops / max(job.predicted_evaluation.flops, 1.0)
        return replace(job.predicted_evaluation * share, flops=flops)

    def _select(self, candidate: PilotCandidate, branch: Branch, stage: Stage) -> None:
        work, pool = self.work, self.work.pool if candidate.whole_pool else self.sample
        folder = work.run.selected(branch.folder)
        if selection.is_done(folder, selection.settings_mark(branch.plan, pool)):
            return
        scores = work.main.folder if candidate.whole_pool else STAGE
        job = replace(
            stages.selection_job(work, branch, self._scoring(candidate, pool)),
            pool=pool,
            scores=work.run.scores(scores),
            among=self.ids,
        )
        selection.select(job, stage)

    def _scoring(self, candidate: PilotCandidate, pool: Store) -> Cost:
        work = self.work
        scorer: Scorer = resolve("scorer", candidate.scorer)
        asked = asked_of(work, work.main, pool.manifest.stats)
        return work.ledger.rates.of(scorer.cost(asked))

    def _branch(self, candidate: PilotCandidate) -> Branch:
        """The run that would follow where it wins, smaller."""
        plan = self.work.plan
        kept = candidate.settings["selection.max_tokens"] or self.work.pool.manifest.num_tokens
        longest = self.work.pool.manifest.max_tokens
        own = plan.selection
        choice = replace(
            own,
            scorer=candidate.scorer,
            picker=own.picker if candidate.picker is None else candidate.picker,
            max_tokens=max(self.plan.sample * kept, float(longest)),
            refresh=Selection().refresh,
        )
        same = replace(plan, selection=choice, training=self._training, control=False)
        place = f"{STAGE}/{_folder_name(candidate.name)}"
        return Branch("budget", same, self.limit, place)

    @cached_property
    def _training(self) -> Training:
        """At a constant rate after the warm-up, so that it can be gone on with."""
        own, first, last = self.work.plan.training, self.plan.rungs[0], self.plan.rungs[-1]
        plain = Training()  # nothing changes on the way
        return replace(
            own,
            max_steps=last.steps,
            warmup_steps=min(own.warmup_steps, max(first.steps // 4, 1)),
            cooldown_steps=0,
            eval_steps=self.plan.eval_steps,
            save_steps=last.steps,
            online=plain.online,
            switch=plain.switch,
            grad_freeze=plain.grad_freeze,
            report_to=(),
        )

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        return drawn(self.work.pool, self.plan.sample, self.work.plan.selection.seed)

    @cached_property
    def sample(self) -> Store:
        return subset(self.work.pool, self.ids, self.work.run.pilot / "pool")

    # -- what it showed ---------------------------------------------------------------------------

    @cached_property
    def _step(self) -> float:
        """FLOPs of a training step."""
        return self.work.predicted(self.work.plan).step.flops

    def _trial(self, candidate: PilotCandidate) -> Trial:
        steps = candidate.settings.get("training.max_steps", self.work.plan.training.max_steps)
        return Trial(
            name=candidate.name,
            history=list(self._history(candidate)),
            flops=float(steps) * self._step,
        )

    def _history(self, candidate: PilotCandidate) -> Iterator[Evaluation]:
        ledger = self.work.ledger
        own = [
            s["id"] for s in ledger.stages() if (s["name"], s["method"]) == (STAGE, candidate.name)
        ]
        for row in ledger.evaluations():
            if row["stage_id"] in own:
                yield Evaluation(
                    step=row["step"],
                    flops=row["step"] * self._step,
                    loss=row["objective"],
                    stderr=row["stderr"],
                )

    def _gain(self, candidate: PilotCandidate) -> Estimate | None:
        return gain_of(self._trial(candidate), self.work.plan.objective.unit)

    def choose(self) -> Choice:
        """By the rule, over all that anything is known of."""
        budget = self.work.ledger.budget
        left = {k: max(v, 0.0) for k, v in budget.left(self.work.ledger.spent()).items()}
        resource = "flops" if "flops" in left else next(iter(left))
        known = ((each, self._gain(each)) for each in self.plan.candidates)
        gains = {each.name: gain for each, gain in known if gain is not None}
        notes = {name: f"until step {steps}" for name, steps in self.until.items()}
        return weigh(gains, notes, Cost.from_dict(left), resource)

    def detail(self) -> dict[str, Any]:
        """Of each candidate how far it came and what it was seen to do."""
        found = {}
        for each in self.plan.candidates:
            trial = self._trial(each)
            found[each.name] = {
                "steps": trial.history[-1].step if trial.history else 0,
                "losses": [e.loss for e in trial.history],
                "run_steps": each.settings.get("training.max_steps"),
                "scores": "the pool" if each.whole_pool else "a sample",
                "still_to_pay": dict(each.to_come),
            }
        return {"candidates": found, "ended_early": self.ended}


def _folder_name(name: str) -> str:
    """Of what a candidate's name may hold."""
    return "".join(c if c.isalnum() else "-" for c in name)
