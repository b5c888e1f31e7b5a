"""What a budget buys: how many steps, of how many micro-batches, watched how often.

Seconds are never certain, so what must come is reserved with a margin before steps are counted.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from thrifty.core.budget import Budget, Cost
from thrifty.core.plan_switch import asks_others
from thrifty.costs.time import SECONDS_MARGIN
from thrifty.effective_tokens import MAX_EPOCHS

if TYPE_CHECKING:
    from thrifty.predictions import Predictions
    from thrifty.request import Request

STEPS_WANTED = 300
MAX_BATCH = 128
"""Sequences of an optimizer step."""
EVALUATION_SHARE = 0.1
"""The most of the budget that evaluations during training may take."""
CHECKPOINT_SHARE = 0.05
"""The most of the training time that saving may take."""
CLOCKED = ("seconds", "dollars", "joules")
FASTER = 2.0
"""How much faster than predicted a run may turn out before it ends for want of steps."""
UNLIMITED_TOKENS = 10e6
"""Priced where nothing but memory is limited and there is no pool."""


def reserved(request: Request, cost: Cost) -> Cost:
    """What the run will set aside for what costs that much: seconds are never certain."""
    return request.rates.of(replace(cost, seconds=cost.seconds * SECONDS_MARGIN))


def minus(request: Request, spent: Cost) -> Budget:
    """What the budget leaves beside what must be reserved; a limit that is used up keeps a sliver,
    so that it binds."""
    left = request.budget.left(reserved(request, spent))
    return replace(request.budget, **{name: max(amount, 1e-30) for name, amount in left.items()})


def affordable(request: Request, step: Cost, left: Budget, pool_tokens: float) -> tuple[float, str]:
    """Steps that the budget buys, and what ends them: a resource, or the pool's epochs."""
    resource, steps = left.binding(Cost(), request.rates.of(step))
    cap = MAX_EPOCHS * pool_tokens / max(step.tokens, 1.0)
    wish = float(request.fixed.get("training.epochs") or 0.0)
    if wish:
        cap = wish * pool_tokens / max(step.tokens, 1.0)
    if resource is None:  # nothing is limited: one pass, as people do by default
        whole = pool_tokens if math.isfinite(pool_tokens) else UNLIMITED_TOKENS
        cap = min(cap, (wish or 1.0) * whole / max(step.tokens, 1.0))
    return (cap, "epochs") if cap < steps else (steps, resource or "epochs")


def watched_apart(
    request: Request,
    costs: Predictions,
    step: Cost,
    once: Cost,
    pool_tokens: float,
    apart: int,
    about: int,
) -> int:
    """The most steps that the budget buys beside ``once`` and an evaluation every ``apart`` steps,
    before the first and after the last; at least ``about``, which do not use the last interval up
    or take an evaluation too many for granted."""
    found = about
    for intervals in range(max(1, about // apart), about // apart + 3):
        left = minus(request, once + costs.watching(intervals + 1, intervals))
        possible, _ = affordable(request, step, left, pool_tokens)
        found = max(found, min(int(possible), intervals * apart))
    return found


def ceiling(
    request: Request, step: Cost, left: Budget, pool_tokens: float, steps: int, binding: str
) -> int:
    """Twice as many steps, if all else allows, where time or what follows from it binds; or FLOPs,
    of which a step may come to take fewer where something else is trained on the way."""
    varying = (*CLOCKED, "flops") if asks_others(request.fixed) else CLOCKED
    if binding not in varying or request.fixed.get("training.max_steps"):
        return steps
    without = replace(left, **dict.fromkeys(varying))
    possible, _ = affordable(request, step, without, pool_tokens)
    return max(steps, int(min(FASTER * steps, possible)))


def accumulation(
    request: Request, sequences: float, rows: int, *, least: int, steps: int = 1
) -> int:
    """Micro-batches of an optimizer step, each of so many rows on all devices together: about 300
    steps in all, or ``steps`` where those are more, at most 128 sequences each. No fewer than
    ``least``: zero where a micro-batch is more than that and a smaller one may do."""
    fixed = request.fixed.get("training.gradient_accumulation_steps")
    if fixed is not None:
        return int(fixed)
    batch = 2 ** round(math.log2(max(1.0, min(sequences / max(STEPS_WANTED, steps), MAX_BATCH))))
    if request.fixed.get("training.per_device_train_batch_size"):
        least = 1
    return max(least, batch // rows)


def watch(request: Request, costs: Predictions, step: Cost, steps: float) -> tuple[int, int]:
    """Evaluations, the first and the last included, and a checkpoint at each but the first, or the
    best evaluated model could not be kept: as many as their shares of what training takes pay for,
    unless the user fixed how far apart they are."""
    training = step * steps
    most = min(16, int(steps) + 1)
    for share, each, more in (
        (EVALUATION_SHARE, costs.evaluation, 0),
        (CHECKPOINT_SHARE, costs.checkpoint, 1),  # at every evaluation but the first
    ):
        for resource in ("flops", "seconds"):
            price = each.of(resource) or 0.0
            if price > 0:
                most = min(most, int(share * (training.of(resource) or 0.0) / price) + more)
    evaluations = max(3, most)
    if apart := request.fixed.get("training.eval_steps"):
        evaluations = math.ceil(steps / apart) + 1
    return evaluations, evaluations - 1
