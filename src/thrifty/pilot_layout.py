"""What a pilot takes: how many steps on each rung, on how large a sample, whose scorings.

    cost = sum_c scoring_c + sum_rungs candidates x (load + steps x step + evaluations + save)

A candidate whose scoring of the whole pool is within its part of the pilot scores the pool, for
keeps; a dearer one scores the sample alone and would pay its full price afterwards, which is taken
off what it could train with. Seconds are reserved with their margin, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thrifty.affordable import reserved
from thrifty.core.budget import CONSUMED, PRICED, Budget, Cost, Rates
from thrifty.core.contracts import Scorer
from thrifty.core.plan_pilot import PilotCandidate, PilotRung
from thrifty.core.resolve import resolve
from thrifty.predictions import Predictions
from thrifty.pricing import Candidate, Pricing
from thrifty.request import Request, never_before
from thrifty.scaling import halving

SCORING_SHARE = 0.5
"""Of what a pilot may take, that its scorings may."""
FIRST_EVALUATIONS = 4
"""On the first rung, after that of the base model."""
LEAST_STEPS = 16
"""Of the first rung: fewer tell nothing."""
MOST_OF_RUN = 0.5
"""Of a run's steps that its pilot's last rung may come to."""
PLANNED_SHARE = 0.9
"""Of what a pilot may take, that it is planned to: what an interruption loses, and a machine that
is slower than predicted, must find room."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pilot, priced."""

    candidates: tuple[PilotCandidate, ...]
    rungs: tuple[PilotRung, ...]
    eval_steps: int
    sample: float
    training: Cost
    """All that is not scoring."""
    rates: Rates

    @property
    def cost(self) -> Cost:
        return self.cost_but("")

    def cost_but(self, name: str) -> Cost:
        """Without the scoring of the candidate of that name."""
        scorings = (Cost.from_dict(c.scoring) for c in self.candidates if c.name != name)
        return self.rates.of(sum(scorings, self.training))


def lay_out(
    request: Request,
    candidates: Sequence[PilotCandidate],
    runs: Sequence[Candidate],
    allowed: Budget,
) -> Layout | str:
    """As many steps as ``allowed`` buys; where that is too few to tell anything, the name of the
    candidate to do without: one too dear to score, or the last. ``runs``: what would follow each.
    """
    measured = replace(request, dev=request.tried or request.dev)
    costs = Pricing(measured).predictor.of(runs[0].setting, runs[0].step)
    longest = max(run.max_steps for run in runs)
    trained = resolve("trained", runs[0].held.technique_names["trained"])
    least = max(LEAST_STEPS, trained.cycle_steps(request.shape))
    free = _Costs(request, costs, len(candidates))
    most = free.first_steps(allowed, Cost())
    if most < least:
        return candidates[-1].name
    # The sample of a pilot whose scorings were free is large enough for what they leave.
    sample = min(1.0, free.last_step(most) / longest)
    scored = _scorings(request, candidates, runs, allowed, sample)
    if isinstance(scored, str):
        return scored
    scoring = sum((Cost.from_dict(each.scoring) for each in scored), Cost())
    steps = min(free.first_steps(allowed, scoring), free.first_within(MOST_OF_RUN * longest))
    if steps < least:
        return candidates[-1].name
    peak = max(cost.peak_memory_bytes for run in runs for cost in run.by_stage.values())
    return Layout(
        candidates=tuple(scored),
        rungs=free.rungs(steps),
        eval_steps=free.eval_steps(steps),
        sample=sample,
        training=replace(free.of(steps), peak_memory_bytes=peak),
        rates=request.rates,
    )


@dataclass(frozen=True)
class _Costs:
    """Of the training of so many candidates, by the steps of the first rung."""

    request: Request
    each: Predictions
    num_candidates: int

    def eval_steps(self, first: int) -> int:
        return max(1, first // FIRST_EVALUATIONS)

    def rungs(self, first: int) -> tuple[PilotRung, ...]:
        apart, ends = self.eval_steps(first), 0
        found = []
        schedule = halving.rungs(self.num_candidates, 1.0)
        for rung in schedule:
            steps = first * rung.budget / schedule[0].budget
            ends += max(1, round(steps / apart)) * apart
            found.append(PilotRung(candidates=rung.num_candidates, steps=ends))
        return tuple(found)

    def last_step(self, first: int) -> int:
        return self.rungs(first)[-1].steps

    def of(self, first: int) -> Cost:
        """Every rung begins with a load and ends with a checkpoint; the base model is evaluated
        once for each candidate."""
        apart, before = self.eval_steps(first), 0
        each = self.each
        total = each.evaluation * self.num_candidates
        for rung in self.rungs(first):
            steps, before = rung.steps - before, rung.steps
            once = each.load + each.step * steps + each.watching(math.ceil(steps / apart), 1)
            total += once * rung.candidates
        return total

    def first_steps(self, allowed: Budget, scoring: Cost) -> int:
        """The most that ``allowed`` buys, a multiple of the evaluations; 0 where not one does."""

        def fits(times: int) -> bool:
            total = reserved(self.request, self.of(times * FIRST_EVALUATIONS) + scoring)
            return all(_within(total.of(name), allowed.limit(name)) for name in CONSUMED)

        if not fits(1):
            return 0
        most = 1
        while fits(2 * most) and most < 2**40:
            most *= 2
        few, many = most, 2 * most
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if fits(middle) else (few, middle)
        return few * FIRST_EVALUATIONS

    def first_within(self, last: float) -> int:
        """The first rung of a pilot that ends by step ``last``."""
        unit = self.last_step(FIRST_EVALUATIONS)
        return int(last // unit) * FIRST_EVALUATIONS


def _within(amount: float | None, limit: float | None) -> bool:
    return limit is None or (amount is not None and amount <= limit)


def _scorings(
    request: Request,
    candidates: Sequence[PilotCandidate],
    runs: Sequence[Candidate],
    allowed: Budget,
    sample: float,
) -> list[PilotCandidate] | str:
    """Each with what it scores and what that takes, or the name of one that takes more than its
    part."""
    part = SCORING_SHARE / len(candidates)
    pool = request.pool
    assert pool is not None, "a pilot picks from a pool"
    found = []
    for each, run in zip(candidates, runs, strict=True):
        # What an earlier run has scored is the whole pool.
        for asked in (request, replace(request, pool=pool.part(sample), is_scored=never_before)):
            whole = asked is request
            cost = _scoring(asked, each, run)
            total = reserved(request, cost)
            limits = ((total.of(name), allowed.limit(name)) for name in CONSUMED)
            if all(_within(amount, limit and limit * part) for amount, limit in limits):
                found.append(replace(each, whole_pool=whole, scoring=amounts_of(cost)))
                break
        else:
            return each.name
    return found


def amounts_of(cost: Cost) -> dict[str, float]:
    """What there is of it, but for what follows from its seconds."""
    values = cost.to_dict().items()
    return {name: value for name, value in values if value and name not in PRICED}


def _scoring(request: Request, candidate: PilotCandidate, run: Candidate) -> Cost:
    """Of the request's pool, the model loaded."""
    fixed = dict(request.fixed)
    if candidate.picker is not None:
        fixed["selection.picker"] = candidate.picker
    pricing = Pricing(replace(request, fixed=fixed))
    scorer: Scorer = resolve("scorer", candidate.scorer)
    load = pricing.predictor.load_seconds(run.setting) * scorer.needs_model
    return pricing.scoring(scorer, run.setting) + Cost(seconds=load)
