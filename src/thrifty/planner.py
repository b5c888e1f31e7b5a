"""From model, pool, targets and budget to a plan: price every combination, drop what does not fit,
rank the rest, and say why.

A combination is (all weights or LoRA) x precision x recompute or not x micro-batch x scorer; what
one is worth and costs is in ``pricing.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.core import quantities
from thrifty.core.contracts import Scorer
from thrifty.core.marginal import Choice, Option, choose
from thrifty.core.plan import LoRA, Training
from thrifty.core.resolve import Spec, all_names, method_class, name_of, resolve
from thrifty.costs.hardware import Device
from thrifty.predictions import predictions
from thrifty.pricing import (
    EVALUATION_SHARE,
    MAX_BATCH,
    QUALITY,
    STEPS_WANTED,
    Candidate,
    Request,
    price,
)

COOLDOWN_SHARE = 0.2
WARMUP_SHARE = 0.05
LEARNING_RATE = 2e-5
"""Of full fine-tuning at width 4096; inversely to width, ten times that for LoRA."""
MAX_LEARNING_RATE = 2e-3


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
            found = price(request, draft, costs, scorer, spec)
            if isinstance(found, Candidate):
                fitting.append(found)
            elif found is not None:
                resource, least = found
                nearest[resource] = min(least, nearest.get(resource, math.inf))
    if not fitting and not nearest:
        tokens = request.pool.num_tokens if request.pool else 0
        raise ValueError(
            f"the pool's {tokens:,} tokens do not fill one training step\n"
            "hint: give a larger pool, or a smaller training.max_length, "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
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


def _lora(request: Request) -> LoRA:
    rank = int(request.fixed.get("training.lora.rank") or LoRA.rank)
    targets = request.fixed.get("training.lora.targets") or request.shape.lora_targets
    return LoRA(rank=rank, targets=tuple(targets))


# -- the rest of the plan -----------------------------------------------------------------------


def training_of(chosen: Candidate, request: Request) -> Training:
    """The chosen combination as plan.yaml's ``training``, the remaining values by their rules."""
    c = chosen
    cooldown = int(COOLDOWN_SHARE * c.max_steps)
    eval_steps = int(
        request.fixed.get("training.eval_steps")
        or max(1, math.ceil(c.max_steps / max(c.num_evaluations - 1, 1)))
    )
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
        save_steps=int(request.fixed.get("training.save_steps") or eval_steps),
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
        name = quantities.NAMES.get(resource, resource)
        lines.append(f"the smallest plan needs {needs} of {name}{allowed}")
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
            f"{quantities.format_tokens(c.keep_tokens)}: {_times(c.epochs, 'pass', 'passes')} over "
            f"what is kept ({epochs_rule}, arXiv:2305.16264)"
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
            f"{c.gradient_accumulation_steps}: {_times(sequences, 'sequence', 'sequences')} "
            f"a step, for about {STEPS_WANTED} steps, and no more than {MAX_BATCH}"
        ),
        "training.max_steps": (
            f"{c.max_steps}: what {c.binding} allow after scoring and evaluating"
            if c.ceiling == c.max_steps
            else f"{c.ceiling}: {c.max_steps} as predicted, and more if {c.binding} allow it"
        ),
        "training.max_length": (
            f"{c.max_length}: holds the longest example, at most 2048"
            if request.pool
            else f"{c.max_length}: taken without a pool to look at"
        ),
        "training.cooldown_steps": "a fifth of the run (arXiv:2405.18392), reserved in the budget",
        "training.learning_rate": (
            "2e-5 at width 4096, inversely to width; ten times that for LoRA, at most 2e-3"
        ),
        "training.eval_steps": (
            f"{c.num_evaluations} evaluations: at most {EVALUATION_SHARE:.0%} of the budget"
        ),
        **asked,
    }


def _times(number: float, one: str, many: str) -> str:
    text = f"{number:.2g}" if number < 100 else f"{number:.0f}"
    return f"{text} {one if text == '1' else many}"
