"""From model, pool, targets and budget to a plan: price every combination, drop what does not fit,
rank the rest, and say why.

A combination is (all weights or LoRA) x precision x recompute or not x micro-batch x scorer. Each
is priced whole: scoring, training, evaluations, checkpoints. What the budget leaves after scoring
buys D training tokens, worth

    D_eff = q * w(s) * D'(D, U),       w(s) = w_5%^min(1, ln(1/s) / ln 20),
    D'(D, U) = U + U R* (1 - exp(-(D/U - 1) / R*)),  R* = 15.4         (arXiv:2305.16264)

with U the tokens kept, s = U / pool, w_5% the scorer's prior worth (which keeping less than the 5%
it was measured at does not raise: docs/log.md, the mixed pool) and q the technique's prior
quality. U is D over the number of epochs, at most four, that makes D_eff largest. Gains enter the
one rule as ``prior`` estimates, a fixed concave function of D_eff: only their order matters here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from thrifty.core import quantities
from thrifty.core.budget import Budget, Cost, PoolStats
from thrifty.core.contracts import Scorer, Work, Worth
from thrifty.core.ledger import Rates
from thrifty.core.marginal import Choice, Estimate, Option, choose
from thrifty.core.plan import LoRA, Training
from thrifty.core.resolve import Spec, all_names, method_class, name_of, resolve
from thrifty.costs.flops import Adapter, train_flops
from thrifty.costs.hardware import Device
from thrifty.costs.memory import RUNTIME_BYTES, MemorySetting, account, checkpoint_bytes
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import SECONDS_MARGIN, step_seconds
from thrifty.signals.forward import forward_cost

REPEAT_HALF_LIFE = 15.4
"""R* of arXiv:2305.16264."""
MAX_EPOCHS = 4
STEPS_WANTED = 300
MAX_BATCH = 128
"""Sequences of an optimizer step."""
EVALUATION_SHARE = 0.1
"""The most of the budget that evaluations during training may take."""
COOLDOWN_SHARE = 0.2
WARMUP_SHARE = 0.05
CHECKPOINT_SHARE = 0.05
"""The most of the training time that saving may take."""
LEARNING_RATE = 2e-5
"""Of full fine-tuning at width 4096; inversely to width, ten times that for LoRA."""
MAX_LEARNING_RATE = 2e-3
PACKING_FILL = 0.96
"""Share of a packed batch that is tokens, not padding, under best-fit decreasing."""
MEMORY_MARGIN = 1.05
CLOCKED = ("seconds", "dollars", "joules")
FASTER = 2.0
"""How much faster than predicted a run may turn out before it ends for want of steps."""
BUILD_SECONDS = 0.5
"""Building a model and what drives it, besides reading its weights."""
DISK_BYTES_PER_SECOND = 4e8
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
    num_saves: int
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


@dataclass(frozen=True)
class Planned:
    """The outcome of a search: the chosen combination, and what it was chosen over."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """Those that fit, best first."""
    num_combinations: int
    choice: Choice
    why: Mapping[str, str]


class NoPlanFits(ValueError):
    """No combination fits the budget; the message says the least that would do."""


def search(request: Request) -> Planned:
    """Price all combinations and choose. Raises NoPlanFits, ValueError for impossible requests."""
    sequence = _sequence(request)
    tried, fitting = 0, []
    nearest: dict[str, float] = {}
    scorers = list(_scorers(request))
    for draft in _drafts(request, sequence):
        costs = predictions(draft, request.shape, request.device, request.dev, request.test)
        for spec, scorer in scorers:
            tried += 1
            found = _price(request, draft, costs, scorer, spec)
            if isinstance(found, Candidate):
                fitting.append(found)
            elif found is not None:
                resource, least = found
                nearest[resource] = min(least, nearest.get(resource, math.inf))
    if not fitting:
        raise NoPlanFits(_least(request, nearest))
    # Of equal gains, to three digits, the faster; of those the smaller.
    fitting.sort(key=lambda c: (-round(c.gain.mean, 3), c.total.seconds, c.peak_memory_bytes))
    finalists = _finalists(fitting)
    options = [Option(c.name, c.gain, c.total, c.binding) for c in finalists]
    resource = finalists[0].binding if finalists[0].binding in ("flops", "seconds") else "flops"
    choice = choose(options, resource=resource, z=1.0)
    by_name = {c.name: c for c in finalists}
    # No option with a certain gain: the one that costs nothing but training itself.
    chosen = by_name[choice.chosen] if choice.chosen else finalists[0]
    return Planned(chosen, tuple(fitting), tried, choice, _reasons(request, chosen, choice))


def _finalists(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The best combination of each scorer, `uniform` first: it wins ties."""
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.scorer, candidate)
    return sorted(best.values(), key=lambda c: (c.scorer != "uniform", -c.gain.mean))


# -- what there is to combine -------------------------------------------------------------------


def _drafts(request: Request, sequence: int) -> Iterator[Training]:
    """Every combination of technique and micro-batch; steps and rates come later."""
    fixed = request.fixed
    methods = _wanted(fixed, "training.method", ("full", "lora"))
    dtypes = _wanted(fixed, "training.dtype", _dtypes(request.device))
    recomputes = _wanted(fixed, "training.activation_checkpointing", (False, True))
    sizes = _wanted(
        fixed, "training.per_device_train_batch_size", (1, 2, 4, 8, 16, 32, 64, MAX_BATCH)
    )
    for method, dtype, recompute, size in itertools.product(methods, dtypes, recomputes, sizes):
        yield Training(
            method=method,
            lora=_lora(request),
            dtype=dtype,
            activation_checkpointing=recompute,
            per_device_train_batch_size=size,
            max_length=sequence,
        )


def _dtypes(device: Device) -> tuple[str, ...]:
    """bf16 where the device is no slower in it."""
    rate = device.flops_per_second
    fast = rate.get("bfloat16", 0.0) >= 0.9 * rate.get("float32", 0.0)
    return ("float32", "bfloat16") if fast else ("float32",)


def _wanted(fixed: Mapping[str, Any], key: str, choices: Sequence[Any]) -> Sequence[Any]:
    return (fixed[key],) if fixed.get(key) is not None else choices


def _scorers(request: Request) -> Iterator[tuple[Spec, Scorer]]:
    """Those that make sense here; a scorer that the user named must."""
    spec = request.fixed.get("selection.scorer")
    if spec is not None:
        scorer = resolve("scorer", spec)
        if scorer.needs_target and not request.targets:
            raise ValueError(
                f"scorer {name_of(scorer)} needs a target\n"
                "hint: --target ROWS like those the model should become good at, or scorer uniform"
            )
        if request.task not in scorer.tasks:
            raise ValueError(
                f"scorer {name_of(scorer)} makes no sense for task {request.task}\n"
                "hint: uniform and length work for every task"
            )
        yield spec, scorer
        return
    for name in all_names("scorer"):
        cls: Any = method_class("scorer", name)
        if request.task in cls.tasks and not (cls.needs_target and not request.targets):
            yield name, cls()


def _sequence(request: Request) -> int:
    """Tokens of a packed sequence: the power of two that holds the longest example, at most 2048
    and the model's context."""
    fixed = request.fixed.get("training.max_length")
    context = request.shape.max_position_embeddings
    if fixed is not None:
        if fixed > context:
            raise ValueError(
                f"training.max_length {fixed} is longer than the model's context of {context}\n"
                f"hint: at most {context}"
            )
        return int(fixed)
    longest = request.pool.max_tokens if request.pool else 1024
    return min(max(64, 2 ** math.ceil(math.log2(max(longest, 1)))), 2048, context)


# -- the price of one combination ---------------------------------------------------------------


def _price(
    request: Request, draft: Training, costs: Predictions, scorer: Scorer, spec: Spec
) -> Candidate | tuple[str, float] | None:
    """The candidate; or the resource it fails on and the least of it that would do; or None for a
    micro-batch larger than a whole step should be."""
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
        each, evaluations = each + costs.evaluation * (1 / apart), 2
    if apart := request.fixed.get("training.save_steps"):
        each, saves = each + costs.checkpoint * (1 / apart), 1
    each = request.rates.of(each)
    left = _minus(request, once + costs.watching(evaluations, saves))
    possible, binding = _affordable(request, each, left, pool_tokens)
    steps = int(possible)
    evaluations, saves = _watch(request, costs, step, steps)
    if request.fixed.get("training.max_steps"):
        steps = min(steps, int(request.fixed["training.max_steps"]))
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
        num_saves=saves,
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


def _lora(request: Request) -> LoRA:
    rank = int(request.fixed.get("training.lora.rank") or LoRA.rank)
    targets = request.fixed.get("training.lora.targets") or request.shape.lora_targets
    return LoRA(rank=rank, targets=tuple(targets))


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


def _rows_cost(
    shape: ModelShape, device: Device, stats: PoolStats | None, training: Training
) -> Cost:
    """Of evaluating rows in batches no larger than a training pass, inside whose peak it stays."""
    if stats is None:
        return Cost()
    most, length = training.micro_batch_tokens, training.max_length
    cost = forward_cost(shape, stats, device, training.dtype, length, most)
    return replace(cost, peak_memory_bytes=0.0)


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
    """Evaluations, the first and the last included, and checkpoints: as many as their shares of
    what training takes pay for, unless the user fixed how far apart they are."""
    training = step * steps

    def paid(share: float, each: Cost, least: int, most: int) -> int:
        for resource in ("flops", "seconds"):
            price = each.of(resource) or 0.0
            if price > 0:
                most = min(most, int(share * (training.of(resource) or 0.0) / price))
        return max(least, most)

    evaluations = paid(EVALUATION_SHARE, costs.evaluation, 3, min(16, int(steps) + 1))
    if apart := request.fixed.get("training.eval_steps"):
        evaluations = math.ceil(steps / apart) + 1
    saves = paid(CHECKPOINT_SHARE, costs.checkpoint, 1, evaluations - 1)
    if apart := request.fixed.get("training.save_steps"):
        saves = math.ceil(steps / apart)
    return evaluations, saves


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


# -- the rest of the plan -----------------------------------------------------------------------


def training_of(chosen: Candidate, request: Request) -> Training:
    """The chosen combination as plan.yaml's ``training``, the remaining values by their rules."""
    c = chosen
    cooldown = int(COOLDOWN_SHARE * c.max_steps)
    eval_steps = int(
        request.fixed.get("training.eval_steps")
        or max(1, math.ceil(c.max_steps / max(c.num_evaluations - 1, 1)))
    )
    saves_apart = math.ceil((c.num_evaluations - 1) / c.num_saves)
    rate = LEARNING_RATE * 4096 / request.shape.hidden_size
    if c.method == "lora":
        rate *= 10
    return Training(
        method=c.method,
        lora=_lora(request) if c.method == "lora" else LoRA(),
        dtype=c.dtype,
        activation_checkpointing=c.activation_checkpointing,
        per_device_train_batch_size=c.per_device_train_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        max_length=c.max_length,
        max_steps=c.ceiling,
        epochs=round(c.epochs * c.ceiling / c.max_steps, 3),
        learning_rate=float(f"{min(rate, MAX_LEARNING_RATE):.2g}"),
        warmup_steps=min(max(1, int(WARMUP_SHARE * c.max_steps)), c.max_steps - cooldown),
        cooldown_steps=cooldown,
        eval_steps=eval_steps,
        save_steps=eval_steps * saves_apart,
    )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The recurring costs of a training run, and the memory at its peak by term."""

    memory: Mapping[str, float]
    step: Cost
    evaluation: Cost
    checkpoint: Cost
    load: Cost
    """Of the base model."""
    test: Cost
    """Of the base and of the trained model, loading both included."""

    def watching(self, evaluations: int, saves: int) -> Cost:
        return self.evaluation * evaluations + self.checkpoint * saves


def predictions(
    training: Training,
    shape: ModelShape,
    device: Device,
    dev: PoolStats | None,
    test: PoolStats | None,
) -> Predictions:
    """What a step, an evaluation, a checkpoint and the test (of two models) take. The step's FLOPs
    and tokens are exact; tokens are positions, the padding of packs included."""
    adapter = None
    if training.method == "lora":
        adapter = Adapter(
            rank=training.lora.rank, targets=training.lora.targets or shape.lora_targets
        )
    setting = MemorySetting(
        micro_batch=training.per_device_train_batch_size,
        sequence=training.max_length,
        dtype=training.dtype,
        adapter=adapter,
        recompute=training.activation_checkpointing,
        masked=True,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        device_kind=device.kind,
    )
    terms = account(shape, setting).by_term
    memory = {**terms, "runtime": float(RUNTIME_BYTES[device.kind])}
    batch, sequence = training.per_device_train_batch_size, training.max_length
    micro = Cost(
        flops=train_flops(
            shape, batch, sequence, adapter=adapter, recompute=training.activation_checkpointing
        ),
        seconds=step_seconds(shape, setting, device),
        tokens=float(batch * sequence),
        peak_memory_bytes=sum(memory.values()),
    )
    save = checkpoint_bytes(shape, setting) / DISK_BYTES_PER_SECOND + 0.1
    load = Cost(seconds=terms["weights"] / DISK_BYTES_PER_SECOND + BUILD_SECONDS)
    tested = (_rows_cost(shape, device, test, training) + load) * 2 if test else Cost()
    return Predictions(
        memory=memory,
        step=micro * training.gradient_accumulation_steps,
        evaluation=_rows_cost(shape, device, dev, training),
        checkpoint=Cost(seconds=save),
        load=load,
        test=tested,
    )


# -- words --------------------------------------------------------------------------------------


def _least(request: Request, nearest: Mapping[str, float]) -> str:
    budget, lines = request.budget, []
    for resource, least in nearest.items():
        show = quantities.FORMATS.get(resource, str)
        limit = budget.limit(resource) or (
            request.device.memory_bytes if resource == "peak_memory_bytes" else None
        )
        allowed = f" but {show(limit)} is allowed" if limit else ""
        needs = show(least) if math.isfinite(least) else "a known price"
        lines.append(f"the smallest plan needs {needs} of {resource}{allowed}")
    return (
        "; ".join(lines) + "\n"
        "hint: raise that limit to what the smallest plan needs, or take a smaller model or pool"
    )


def _reasons(request: Request, chosen: Candidate, choice: Choice) -> dict[str, str]:
    """One line a choice."""
    c, device = chosen, request.device
    limit = request.budget.memory_bytes or device.memory_bytes
    sequences = c.per_device_train_batch_size * c.gradient_accumulation_steps
    quality, why_quality = QUALITY[(c.method, c.dtype)]
    asked = {key: f"{value}: as asked" for key, value in request.fixed.items()}
    epochs_rule = "at most 4 passes: repeated tokens are worth 93% of fresh ones by then"
    return {
        "selection.scorer": f"{c.scorer}: {choice.reason}",
        "selection.max_tokens": (
            f"{quantities.format_tokens(c.keep_tokens)}: {c.epochs:.2g} passes over what is kept "
            f"({epochs_rule}, arXiv:2305.16264)"
        ),
        "training.method": f"{c.method} in {c.dtype}: quality prior {quality} ({why_quality})",
        "training.per_device_train_batch_size": (
            f"{c.per_device_train_batch_size}: the fastest per token whose peak of "
            f"{quantities.format_bytes(c.peak_memory_bytes)} fits {quantities.format_bytes(limit)}"
        ),
        "training.activation_checkpointing": (
            "recompute: activations would not fit otherwise, or only in slower micro-batches"
            if c.activation_checkpointing
            else "no recompute: activations fit"
        ),
        "training.gradient_accumulation_steps": (
            f"{c.gradient_accumulation_steps}: {sequences} sequences a step, for about "
            f"{STEPS_WANTED} steps"
        ),
        "training.max_steps": (
            f"{c.max_steps}: what {c.binding} allow after scoring and evaluating"
            if c.ceiling == c.max_steps
            else f"{c.ceiling}: {c.max_steps} as predicted, and more if {c.binding} allow it"
        ),
        "training.max_length": f"{c.max_length}: holds the longest example, at most 2048",
        "training.cooldown_steps": "a fifth of the run (arXiv:2405.18392), reserved in the budget",
        "training.learning_rate": (
            "2e-5 at width 4096, inversely to width; ten times that for LoRA, at most 2e-3"
        ),
        "training.eval_steps": (
            f"{c.num_evaluations} evaluations: at most {EVALUATION_SHARE:.0%} of the budget"
        ),
        **asked,
    }
