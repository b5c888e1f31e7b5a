"""Why a plan is as it is, a line a value; and what would do where none fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from thrifty.advice import scoring_relief
from thrifty.affordable import EVALUATION_SHARE, MAX_BATCH, STEPS_WANTED
from thrifty.answers import Answers
from thrifty.core import quantities
from thrifty.core.marginal import Choice
from thrifty.core.plan import Training
from thrifty.held import REFERENCE
from thrifty.pricing import Candidate, Refused, excesses
from thrifty.request import Request

SHORTEST = 64
"""Tokens of a sequence that is worth offering."""


def least_that_would_do(
    request: Request, refused: Sequence[Refused], larger: Callable[[Refused], str | None]
) -> str:
    """What the nearest of all ways lacks: of one limit, if one alone stands in the way; and the
    ways out. ``larger``: the device that would hold a refused way, for people."""
    passed = [(refusal, excesses(request, refusal.least)) for refusal in refused]
    fewest = min(len(found) for _, found in passed)
    near = [(refusal, found) for refusal, found in passed if len(found) == fewest]
    refusal, found = min(near, key=lambda each: math.prod(each[1].values()))
    limits = {**request.budget.to_dict(), "peak_memory_bytes": request.memory_limit}
    lines = []
    for resource in found:
        needed = refusal.least.of(resource)
        if needed is None or not math.isfinite(needed):
            lines.append(f"needs a known price, for {quantities.NAMES.get(resource, resource)}")
            continue
        show, limit = quantities.FORMATS.get(resource, str), limits.get(resource)
        of = " of peak memory" if resource == "peak_memory_bytes" else ""
        allowed = f" but {show(limit)} is allowed" if limit else ""
        lines.append(f"needs {show(needed)}{of}{allowed}")
    here = "on this machine's CPU " if request.device.kind == "cpu" else ""
    what = (
        f"{here}the smallest plan ({refusal.name}) " if fewest == 1 else f"{here}the nearest plan "
    )
    ways = ["raise that limit to what it needs"]
    if "peak_memory_bytes" in found:
        phase = refusal.account(request).peak_phase
        lines[-1] += f" (at {phase})"
        length = _length_that_fits(request, refusal)
        if length:
            ways.append(f"shorten rows: --set training.max_length={length} fits the memory")
        if phase in ("score", "refresh"):
            ways += [way.text for way in scoring_relief(refusal.account(request), request)]
        if device := larger(refusal):
            ways.append(device)
    smaller = "model, pool, dev or test set" if request.pool else "model"
    ways.append(f"take a smaller {smaller}")
    if request.serving is not None:
        ways.append("answer fewer questions")
    return f"{what}{' and '.join(lines)}\nhint: {'; or '.join(ways)}"


def _length_that_fits(request: Request, refusal: Refused) -> int | None:
    """Half the sequence, or half of that, and so on, at which the refused way fits the memory."""
    length = refusal.setting.sequence // 2
    while length >= SHORTEST:
        shorter = replace(refusal, setting=replace(refusal.setting, sequence=length))
        if shorter.account(request).peak_memory_bytes <= request.most_allocated:
            return length
        length //= 2
    return None


def reasons(
    request: Request, chosen: Candidate, choice: Choice, training: Training, answers: Answers
) -> dict[str, str]:
    """One line a choice; ``answers``: what the chosen techniques are there for."""
    c = chosen
    limit = request.memory_limit
    sequences = training.step_sequences
    quality = c.quality
    asked = {key: f"{value}: as asked" for key, value in request.fixed.items()}
    epochs_rule = "at most 4 passes: repeated tokens are worth 93% of fresh ones by then"
    found = {
        "selection.scorer": f"{c.scorer}: {choice.reason}",
        "selection.max_tokens": (
            f"{quantities.format_tokens(c.keep_tokens)}: {_times(c.epochs, 'pass', 'passes')} over "
            f"what is kept ({epochs_rule}, arXiv:2305.16264)"
        ),
        "training.memory.trained": (
            f"{c.method} on {c.techniques['weights']} weights: a token is worth "
            f"{quality.mean:.2g} ± {quality.stderr:.1g} of one under the reference, a prior "
            f"({quality.source})"
        ),
        **_techniques(request, c, answers),
        "training.per_device_train_batch_size": (
            f"{c.per_device_train_batch_size}: the fastest per token whose peak of "
            f"{quantities.format_bytes(c.peak_memory_bytes)} fits {quantities.format_bytes(limit)}"
        ),
        "training.memory.activations": (
            f"{c.techniques['activations']}: kept whole they would not fit, or only in slower "
            "micro-batches"
            if c.techniques["activations"] != REFERENCE["activations"]
            else "keep: activations fit"
        ),
        "training.gradient_accumulation_steps": (
            f"{c.gradient_accumulation_steps}: {_times(sequences, 'sequence', 'sequences')} "
            f"a step, for about {STEPS_WANTED} steps, and no more than {MAX_BATCH}"
        ),
        "training.max_steps": (
            f"{c.max_steps}: what {c.binding} allow after scoring and evaluating"
            if c.ceiling == c.max_steps
            else f"{c.ceiling}: a cap; {c.max_steps} steps are predicted to use up the "
            f"{c.binding}, and if they turn out faster, training goes on, up to the cap"
        ),
        "training.max_length": (
            f"{c.max_length}: holds the longest example, at most 2048"
            if request.pool
            else f"{c.max_length}: taken without a pool to look at"
        ),
        "training.warmup_steps": (
            f"{training.warmup_steps}: a twentieth of the run"
            + (
                "; a pretrained model's rate is warmed up again (arXiv:2308.04014, 2403.08763)"
                if request.task == "continued"
                else ""
            )
        ),
        "training.cooldown_steps": (
            f"{training.cooldown_steps}: a fifth of the run (arXiv:2405.18392), reserved in the "
            "budget"
        ),
        "training.learning_rate": (
            f"{training.learning_rate:g}: 2e-5 at width 4096, inversely to width; ten times that "
            "for LoRA, at most 2e-3"
        ),
        "training.eval_steps": (
            f"{training.eval_steps}: {c.num_evaluations} evaluations, at most "
            f"{EVALUATION_SHARE:.0%} of the budget"
        ),
        **asked,
    }
    if c.is_scored:
        found["selection.scorer"] += "; an earlier run left its scores, which are taken over"
    return found


def _techniques(request: Request, c: Candidate, answers: Answers) -> dict[str, str]:
    """Weights, optimizer and loss, where they are not the usual."""
    found = {
        f"training.memory.{kind}": f"{c.techniques[kind]}: {_purpose(kind, c, answers)}"
        for kind in ("weights", "states", "loss")
        if c.techniques[kind] != REFERENCE[kind]
    }
    peaks = request.device.flops_per_second
    if c.dtype == "bfloat16" and not peaks.get("bfloat16", 1.0):
        found["training.memory.weights"] += (
            f"; {request.device.name} has no instructions for bfloat16, and how much slower it is "
            "without is not in the seconds"
        )
    return found


def _purpose(kind: str, c: Candidate, answers: Answers) -> str:
    name, instead = c.techniques[kind], REFERENCE[kind]
    if name in answers.makes_it_fit:
        return f"nothing fits with {instead} in its place"
    if name in answers.makes_the_batch_fit:
        return f"this micro-batch does not fit with {instead} in its place"
    if name in answers.better_per_flop:
        return f"for what it is worth, a token costs less than under {instead}"
    if name not in answers.frees_bytes:
        return f"{instead} does not go with the rest of it"
    if (frees := answers.frees_bytes[name]) > 0:
        return f"as good as {instead}, and frees {quantities.format_bytes(frees)}"
    return f"about as good as {instead}"


def _times(number: float, one: str, many: str) -> str:
    text = f"{number:.2g}" if number < 100 else f"{number:.0f}"
    return f"{text} {one if text == '1' else many}"
