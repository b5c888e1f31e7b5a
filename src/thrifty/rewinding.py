"""What is not finite in training: back to the last checkpoint, which is good, and on from there
without the batch that it came of. A few times in a run, each written down; the steps that are done
again are charged as lost.

A loss or gradient that is not finite is seen before its update, so that its own batch is passed
over; where an evaluation finds it, all batches since the checkpoint are. (Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1, go back some hundred steps and pass over some hundred batches.)
"""

from __future__ import annotations

from thrifty.core.ledger import Stage
from thrifty.divergence import NonFiniteGradient
from thrifty.evaluation import Diverged

DECISION = "go on after what is not finite"
NOT_FINITE = (NonFiniteGradient, FloatingPointError, Diverged)
"""The last is an evaluation's, the second some optimizers' own."""


def skipped_steps(stage: Stage) -> frozenset[int]:
    """That are passed over in this run."""
    return frozenset(step for steps in _rewinds(stage) for step in steps)


def rewind(stage: Stage, error: BaseException, step: int, saved: int, most: int) -> bool:
    """Whether to go on without what was not finite after ``step`` steps, from the checkpoint of
    ``saved`` (0: the base model). Not where that was done ``most`` times, or where the base itself
    is bad."""
    if (step == 0 and isinstance(error, Diverged)) or len(_rewinds(stage)) >= most:
        return False
    bad = range(saved + 1, step + 1) if isinstance(error, Diverged) else range(step + 1, step + 2)
    if not bad:
        return False
    which = f"step {bad[0]}" if len(bad) == 1 else f"steps {bad[0]} to {bad[-1]}"
    stage.decide(
        DECISION,
        f"pass over {which}",
        str(error).partition("\n")[0],
        detail={"skipped": list(bad), "from_step": saved},
        step=step,
    )
    return True


def _rewinds(stage: Stage) -> list[list[int]]:
    found = [row for row in stage.ledger.decisions() if row["stage_id"] == stage.id]
    return [row["detail"]["skipped"] for row in found if row["name"] == DECISION]
