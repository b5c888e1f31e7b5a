"""One combination, priced whole: scoring, training, evaluations, checkpoints, test.

What the budget leaves after scoring buys D training tokens, worth

    D_eff = q * w(s) * D'(D, U),       w(s) = w_5%^min(1, ln(1/s) / ln 20),
    D'(D, U) = U + U R* (1 - exp(-(D/U - 1) / R*)),  R* = 15.4         (arXiv:2305.16264)

with U the tokens kept, s = U / pool, w_5% the scorer's prior worth (which keeping less than the 5%
it was measured at does not raise: docs/log.md, the mixed pool) and q the technique's prior
quality. U is D over the number of epochs, at most four, that makes D_eff largest. Gains enter the
one rule as ``prior`` estimates, a fixed concave function of D_eff: only their order matters here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from thrifty.core.budget import Budget, Cost, PoolStats
from thrifty.core.contracts import Scorer, Work, Worth
from thrifty.core.ledger import Rates
from thrifty.core.marginal import Estimate
from thrifty.core.plan import Training
from thrifty.core.resolve import Spec, name_of
from thrifty.costs.hardware import Device
from thrifty.costs.memory import RUNTIME_BYTES
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import SECONDS_MARGIN
from thrifty.predictions import Predictions

REPEAT_HALF_LIFE = 15.4
"""R* of arXiv:2305.16264."""
MAX_EPOCHS = 4
STEPS_WANTED = 300
MAX_BATCH = 128
"""Sequences of an optimizer step."""
EVALUATION_SHARE = 0.1
"""The most of the budget that evaluations during training may take."""
CHECKPOINT_SHARE = 0.05
"""The most of the training time that saving may take."""
PACKING_FILL = 0.96
"""Share of a packed batch that is tokens, not padding, under best-fit decreasing."""
MEMORY_MARGIN = 1.05
CLOCKED = ("seconds", "dollars", "joules")
FASTER = 2.0
"""How much faster than predicted a run may turn out before it ends for want of steps."""
PICK_SECONDS = 2.5e-5
"""Of filtering and picking, a row."""

QUALITY = {
    ("full", "float32"): (1.0, "reference"),
    ("full", "bfloat16"): (0.9, "weights in plain bf16 lose small updates: 1.051 for 1.014 nats"),
    ("lora", "float32"): (0.6, "LoRA learns less per token, arXiv:2405.09673"),
    ("lora", "bfloat16"): (0.6, "LoRA learns less per token, arXiv:2405.09673"),
}
"""Prior worth of a token trained on by a technique; edit to taste."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan for: everything that the planner may not choose itself."""

    shape: ModelShape
    budget: Budget
    device: Device
    rates: Rates
    pool: PoolStats | None = None
    targets: Mapping[str, PoolStats] = field(default_factory=dict)
    dev: PoolStats | None = None
    """All dev rows together."""
    test: PoolStats | None = None
    task: Literal["sft", "continued", "preference"] = "sft"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """plan.yaml keys that the user set: ``training.method``, ``selection.scorer``, ..."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One combination, priced."""

    method: Literal["full", "lora"]
    dtype: Literal["float32", "bfloat16"]
    activation_checkpointing: bool
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    scorer: str
    scorer_spec: Spec
    memory: Mapping[str, float]
    """Bytes by term at the peak."""
    peak_memory_bytes: float
    step: Cost
    max_steps: int
    """As predicted to fit."""
    ceiling: int
    """Steps to allow for: where a clock ends the run, it may turn out faster than predicted."""
    num_evaluations: int
    epochs: float
    keep_tokens: float
    by_stage: Mapping[str, Cost]
    binding: str
    gain: Estimate

    @property
    def name(self) -> str:
        recompute = " recompute" if self.activation_checkpointing else ""
        batch = f"{self.per_device_train_batch_size}x{self.gradient_accumulation_steps}"
        return f"{self.scorer}, {self.method} {self.dtype} {batch}{recompute}"

    @property
    def total(self) -> Cost:
        return sum(self.by_stage.values(), Cost())


def price(
    request: Request, draft: Training, costs: Predictions, scorer: Scorer, spec: Spec
) -> Candidate | tuple[str, float] | None:
    """The candidate; or the resource it fails on and the least of it that would do; or None for a
    micro-batch larger than a whole step should be, or than the pool fills."""
    micro_batch = draft.per_device_train_batch_size
    limit = request.budget.memory_bytes or request.device.memory_bytes
    peak = costs.step.peak_memory_bytes
    if peak * MEMORY_MARGIN > limit:
        return "peak_memory_bytes", peak * MEMORY_MARGIN
    scoring = _scoring(request, scorer, draft.dtype, draft.max_length)
    if scoring.peak_memory_bytes * MEMORY_MARGIN > limit:
        return "peak_memory_bytes", scoring.peak_memory_bytes * MEMORY_MARGIN
    micro = costs.step
    once = scoring + costs.load * (2 if scorer.needs_model else 1) + costs.test
    pool_tokens = float(request.pool.num_tokens) if request.pool else math.inf
    # Steps without watching first, for how much watching a share of them pays; then with it.
    left = _minus(request, once + costs.watching(2, 1))
    wanted, binding = _affordable(request, micro, left, pool_tokens)
    accumulation = _accumulation(request, wanted * micro_batch, micro_batch)
    if accumulation < 1:
        return None
    step = request.rates.of(micro * accumulation)
    evaluations, saves = _watch(request, costs, step, wanted / accumulation)
    each = step  # with its share of what was asked to come at fixed distances
    if apart := request.fixed.get("training.eval_steps"):
        each = request.rates.of(each + (costs.evaluation + costs.checkpoint) * (1 / apart))
        evaluations, saves = 2, 1
    left = _minus(request, once + costs.watching(evaluations, saves))
    possible, binding = _affordable(request, each, left, pool_tokens)
    steps = int(possible)
    evaluations, saves = _watch(request, costs, step, steps)
    if request.fixed.get("training.max_steps"):
        steps = min(steps, int(request.fixed["training.max_steps"]))
    if steps < 1 and binding == "epochs":
        return None
    if steps < 1:
        needed = _reserved(request, once + costs.watching(evaluations, saves) + step)
        return binding, needed.of(binding) or math.inf
    tokens = steps * step.tokens * PACKING_FILL
    epochs, keep, effective = _keep(scorer.worth, tokens, pool_tokens, request)
    quality, _ = QUALITY[(draft.method, draft.dtype)]
    training = costs.load + step * steps + costs.watching(evaluations, saves)
    return Candidate(
        method=draft.method,
        dtype=draft.dtype,
        activation_checkpointing=draft.activation_checkpointing,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_length=draft.max_length,
        scorer=name_of(scorer),
        scorer_spec=spec,
        memory=costs.memory,
        peak_memory_bytes=peak,
        step=step,
        max_steps=steps,
        ceiling=_ceiling(request, each, left, pool_tokens, steps, binding),
        num_evaluations=evaluations,
        epochs=epochs,
        keep_tokens=keep,
        by_stage={
            "select": request.rates.of(scoring + costs.load * scorer.needs_model),
            "train": request.rates.of(training),
            "test": request.rates.of(costs.test),
        },
        binding=binding,
        gain=_gain(effective * quality, scorer.worth),
    )


def _scoring(request: Request, scorer: Scorer, dtype: str, sequence: int) -> Cost:
    if request.pool is None:
        return Cost()
    work = Work(
        pool=request.pool,
        targets=request.targets,
        shape=request.shape,
        device=request.device,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        max_length=sequence,
    )
    cost = scorer.cost(work)
    runtime = float(RUNTIME_BYTES[request.device.kind])
    return replace(
        cost,
        seconds=cost.seconds + PICK_SECONDS * request.pool.num_examples,
        peak_memory_bytes=cost.peak_memory_bytes + runtime,
    )


def _reserved(request: Request, cost: Cost) -> Cost:
    """What the run will set aside for what costs that much: seconds are never certain."""
    return request.rates.of(replace(cost, seconds=cost.seconds * SECONDS_MARGIN))


def _minus(request: Request, spent: Cost) -> Budget:
    """What the budget leaves beside what must be reserved; a limit that is used up keeps a sliver,
    so that it binds."""
    left = request.budget.left(_reserved(request, spent))
    return replace(request.budget, **{name: max(amount, 1e-30) for name, amount in left.items()})


def _affordable(
    request: Request, step: Cost, left: Budget, pool_tokens: float
) -> tuple[float, str]:
    """Steps that the budget buys, and what ends them: a resource, or the pool's epochs."""
    resource, steps = left.binding(Cost(), request.rates.of(step))
    cap = MAX_EPOCHS * pool_tokens / max(step.tokens, 1.0)
    wish = float(request.fixed.get("training.epochs") or 0.0)
    if wish:
        cap = wish * pool_tokens / max(step.tokens, 1.0)
    if resource is None:  # nothing is limited: one pass, as people do by default
        cap = min(cap, (wish or 1.0) * pool_tokens / max(step.tokens, 1.0))
    if math.isinf(cap) and math.isinf(steps):
        return 1.0, "nothing"
    return (cap, "epochs") if cap < steps else (steps, resource or "epochs")


def _ceiling(
    request: Request, step: Cost, left: Budget, pool_tokens: float, steps: int, binding: str
) -> int:
    """Twice as many steps where time or what follows from it binds, if all else allows."""
    if binding not in CLOCKED or request.fixed.get("training.max_steps"):
        return steps
    timeless = replace(left, **dict.fromkeys(CLOCKED))
    possible, _ = _affordable(request, step, timeless, pool_tokens)
    return max(steps, int(min(FASTER * steps, possible)))


def _accumulation(request: Request, sequences: float, micro_batch: int) -> int:
    """Micro-batches of an optimizer step: about 300 steps in all, at most 128 sequences each. Zero
    where one micro-batch is more than that."""
    fixed = request.fixed.get("training.gradient_accumulation_steps")
    if fixed is not None:
        return int(fixed)
    batch = 2 ** round(math.log2(max(1.0, min(sequences / STEPS_WANTED, MAX_BATCH))))
    least = 1 if request.fixed.get("training.per_device_train_batch_size") else 0
    return max(least, batch // micro_batch)


def _watch(request: Request, costs: Predictions, step: Cost, steps: float) -> tuple[int, int]:
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


# -- what the tokens are worth ------------------------------------------------------------------


def _keep(
    worth: Worth, tokens: float, pool_tokens: float, request: Request
) -> tuple[float, float, float]:
    """Epochs, tokens to keep, and the effective tokens, at their best."""
    fixed_keep = request.fixed.get("selection.max_tokens")
    if fixed_keep:
        unique = min(float(fixed_keep), pool_tokens)
        return tokens / unique, unique, _effective(worth, tokens, unique, pool_tokens)
    best = (1.0, min(tokens, pool_tokens), -math.inf)
    for epochs in range(1, MAX_EPOCHS + 1):
        unique = min(tokens / epochs, pool_tokens)
        effective = _effective(worth, tokens, unique, pool_tokens)
        if effective > best[2] * (1 + 1e-9):
            best = (tokens / unique, unique, effective)
    return best


def _effective(worth: Worth, tokens: float, unique: float, pool_tokens: float) -> float:
    share = unique / pool_tokens if math.isfinite(pool_tokens) else 1.0
    multiple = worth.mean ** min(1.0, math.log(1 / max(share, 1e-6)) / math.log(20))
    repeats = max(tokens / unique - 1.0, 0.0)
    fresh = unique + unique * REPEAT_HALF_LIFE * -math.expm1(-repeats / REPEAT_HALF_LIFE)
    return multiple * fresh


def _gain(effective: float, worth: Worth) -> Estimate:
    """A concave prior: 0.1 nats a token for every e-fold of effective tokens past a thousand."""
    relative = worth.stderr / worth.mean
    return Estimate(0.1 * math.log1p(effective / 1e3), 0.1 * relative, "nats/token", "prior")
