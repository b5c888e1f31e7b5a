"""From model, pool, targets and budget to a plan: price every combination, drop what does not fit,
rank the rest, and say why.

A combination is one memory technique of each kind x micro-batch (``combinations.py``) x scorer;
what one is worth and costs is in ``pricing.py``. Those that are slower, no smaller and no better
than another are dropped before they are priced whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.choices import combinations_of, lora_of, scorers_of, sequence_of
from thrifty.combinations import Combinations, Held
from thrifty.core.marginal import Choice, Option, choose
from thrifty.core.plan import LoRA, Training
from thrifty.explanations import least_that_would_do, reasons
from thrifty.pricing import Candidate, Pricing, Refused, Request

COOLDOWN_SHARE = 0.2
WARMUP_SHARE = 0.05
LEARNING_RATE = 2e-5
"""Of full fine-tuning at width 4096; inversely to width, ten times that for LoRA."""
MAX_LEARNING_RATE = 2e-3
NEAR = 0.025
"""Of prior gain: a quarter of the effective tokens, which is less than the priors can tell, and not
worth hours."""
PRICED_WHOLE = 40
"""Ways to hold a step that are priced with every scorer."""


@dataclass(frozen=True)
class Planned:
    """The outcome of a search: the chosen combination, and what it was chosen over."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """Those that fit and are worth a look, best first."""
    num_combinations: int
    num_fitting: int
    choice: Choice
    why: Mapping[str, str]
    training: Training
    """The chosen combination as plan.yaml's ``training``."""
    combinations: Combinations


class NoPlanFits(ValueError):
    """No combination fits the budget; the message says the least that would do."""


def search(request: Request) -> Planned:
    """Price all combinations and choose. Raises NoPlanFits, ValueError for impossible requests."""
    scorers = list(scorers_of(request))
    combinations = combinations_of(request, sequence_of(request))
    pricing = Pricing(request)
    fitting: list[Candidate] = []
    refused: list[Refused] = []
    for held in _worth_pricing(combinations, request):
        for spec, scorer in scorers:
            found = pricing.price(held, scorer, spec)
            if isinstance(found, Candidate):
                fitting.append(found)
            elif found is not None:
                refused.append(found)
    if not fitting and not refused:
        tokens = request.pool.num_tokens if request.pool else 0
        raise ValueError(
            f"the pool's {tokens:,} tokens do not fill one training step\n"
            "hint: give a larger pool, or a smaller training.max_length, "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    if not fitting:
        raise NoPlanFits(least_that_would_do(request, refused))
    fitting.sort(key=lambda c: (-round(c.gain.mean, 3), c.total.seconds, c.peak_memory_bytes))
    finalists = _finalists(fitting)
    options = [Option(c.name, c.gain, c.total, c.binding) for c in finalists]
    resource = finalists[0].binding if finalists[0].binding in ("flops", "seconds") else "flops"
    choice = choose(options, resource=resource, z=1.0)
    by_name = {c.name: c for c in finalists}
    # No option with a certain gain: the one that costs nothing but training itself.
    chosen = by_name[choice.chosen] if choice.chosen else finalists[0]
    training = training_of(chosen, request)
    return Planned(
        chosen=chosen,
        candidates=tuple(fitting),
        num_combinations=combinations.num_combinations * len(scorers),
        num_fitting=combinations.num_fitting(request.most_allocated) * len(scorers),
        choice=choice,
        why=reasons(request, chosen, choice, training),
        training=training,
        combinations=combinations,
    )


def _worth_pricing(combinations: Combinations, request: Request) -> list[Held]:
    """Of each quality the fastest that fits, of each device memory that it takes the fastest; and
    the smallest of all, for what a larger budget would have to be."""
    limit = request.most_allocated
    found: list[tuple[float, float, Held]] = []
    smallest: tuple[float, Held] | None = None
    for held in combinations.held:
        peaks = held.block.peaks[held.state]
        fits = np.flatnonzero(peaks <= limit)
        if len(fits):
            rows = held.seconds_a_row[fits]
            found.append((float(rows.min()), float(peaks[fits].min()), held))
        elif smallest is None or peaks.min() < smallest[0]:
            smallest = (float(peaks.min()), held)
    kept: list[Held] = []
    smaller: dict[tuple[float, float, bool, bool, int], float] = {}
    found.sort(key=lambda each: each[0])
    for _, least, held in found:  # a slower one must be smaller than all faster ones
        prior = held.quality
        like = (
            round(prior.mean, 4),
            round(prior.stderr, 4),
            held.masked,
            held.runs,
            held.num_devices,
        )
        if least < smaller.get(like, math.inf) * 0.98:
            smaller[like] = least
            kept.append(held)
    best = sorted(kept, key=lambda held: (-held.runs, -held.quality.mean))[:PRICED_WHOLE]
    if not best and smallest is not None:
        best = [smallest[1]]
    return best


def _finalists(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The best way to hold a step for each scorer, `uniform` first: it wins ties. Of those whose
    lower bound is no more than ``NEAR`` below that of the best, the fastest is taken."""
    by_scorer: dict[str, list[Candidate]] = {}
    for candidate in ranked:
        by_scorer.setdefault(candidate.scorer, []).append(candidate)
    best = []
    for candidates in by_scorer.values():
        top = candidates[0]
        best_surely = top.gain.mean - _guess(top)
        near = [c for c in candidates if c.gain.mean - _guess(c) >= best_surely - NEAR]
        best.append(min(near or [top], key=_preference))
    return sorted(best, key=lambda c: (c.scorer != "uniform", -c.gain.mean))


def _preference(candidate: Candidate) -> tuple[bool, float, float, float]:
    """What a run can train with first, then speed to two digits, worth, size."""
    speed = float(f"{candidate.step.seconds / candidate.step.tokens:.2g}")
    return not candidate.runs, speed, -candidate.gain.mean, candidate.peak_memory_bytes


def _guess(candidate: Candidate) -> float:
    """What the quality prior alone adds to the error of a gain."""
    return 0.1 * candidate.quality.stderr / candidate.quality.mean


# -- the rest of the plan -----------------------------------------------------------------------


def training_of(chosen: Candidate, request: Request) -> Training:
    """The chosen combination as plan.yaml's ``training``, the remaining values by their rules."""
    c = chosen
    cooldown = int(COOLDOWN_SHARE * c.max_steps)
    eval_steps = int(request.fixed.get("training.eval_steps") or _eval_steps(c, request))
    rate = LEARNING_RATE * 4096 / request.shape.hidden_size
    if c.method == "lora":
        rate *= 10
    return Training(
        method=c.method,
        lora=lora_of(request) if c.method == "lora" else LoRA(),
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


def _eval_steps(chosen: Candidate, request: Request) -> int:
    """Apart as the number of evaluations says. Where the user fixed save_steps, the next divisor of
    it (itself, where it is less): a checkpoint carries its evaluation."""
    apart = max(1, math.ceil(chosen.max_steps / max(chosen.num_evaluations - 1, 1)))
    save_steps = int(request.fixed.get("training.save_steps") or 0)
    divisors = (d for d in range(apart, save_steps + 1) if save_steps % d == 0)
    return next(divisors, save_steps or apart)
