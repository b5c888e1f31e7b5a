"""Who chooses rows anew on the way of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from thrifty import selection
from thrifty.core.budget import Cost
from thrifty.core.contracts import Scorer
from thrifty.core.ledger import Stage
from thrifty.core.plan_refresh import looks_again, may_take_over
from thrifty.core.resolve import resolve
from thrifty.open_run import Branch, Work
from thrifty.priors import load_priors
from thrifty.refresh import Refresher
from thrifty.rounds import Rounds
from thrifty.training_rows import asked_of, leg_of


def refresher_of(
    work: Work,
    branch: Branch,
    stage: Stage,
    rounds: Rounds,
    predicted: Cost,
    job_of: Callable[[], selection.SelectionJob],
) -> Refresher | None:
    """None where the plan chooses once, which reads none of what ``job_of`` does. Tells ``rounds``
    that there may be other rows to come."""
    plan = branch.plan
    if plan.selection.refresh.when == "never":
        return None
    job = job_of()
    rounds.leg_of = partial(leg_of, work.pool, work.run.replay, plan.training)
    step_tokens = plan.training.step_sequences * plan.training.max_length
    steps = min(plan.training.max_steps, predicted.tokens / step_tokens or math.inf)
    own: Scorer = resolve("scorer", plan.selection.scorer)
    priors = load_priors()
    folder = work.run.selected(branch.folder)
    asked = asked_of(work, branch, work.pool.manifest.stats)
    return Refresher(
        job,
        replace(asked, shape=asked.shape.under(asked.adapter)),
        [(each, priors.of(each)) for each in (looks_again(plan), *may_take_over(plan))],
        priors.of(own),
        selection.scored(job, stage),
        np.load(folder / "ids.npy", allow_pickle=False),
        run_flops=steps * work.predicted(plan).step.flops,
        num_evaluations=max(1, int(steps // plan.training.eval_steps)),
        eval_steps=plan.training.eval_steps,
        folder=work.run.refreshes(branch.folder),
    )
