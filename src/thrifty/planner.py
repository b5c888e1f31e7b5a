"""From model, pool, targets and budget to a plan: price every combination, drop what does not fit,
rank the rest, and say why.

A combination is one memory technique of each kind x micro-batch (``combinations.py``) x scorer;
what one is worth and costs is in ``pricing.py``. Those that are slower, no smaller and no better
than another are dropped before they are priced whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from thrifty.affordable import CLOCKED, UNLIMITED_TOKENS
from thrifty.answers import Purposes
from thrifty.choices import combinations_of, scorers_of, sequence_of
from thrifty.combinations import Combinations
from thrifty.core import quantities
from thrifty.core.ledger import Rates
from thrifty.core.marginal import Choice, Option, choose
from thrifty.core.plan import Training
from thrifty.core.resolve import name_of
from thrifty.core.uncollected import uncollected
from thrifty.costs.allocator import allocatable
from thrifty.costs.hardware import DEVICES, dollars_per_hour
from thrifty.explanations import least_that_would_do, reasons
from thrifty.held import REFERENCE, Held
from thrifty.memory_plan import memory_plan_of
from thrifty.pricing import Candidate, Pricing, Refused
from thrifty.request import MEMORY_MARGIN, Request

COOLDOWN_SHARE = 0.2
WARMUP_SHARE = 0.05
LEARNING_RATE = 2e-5
"""Of full fine-tuning at width 4096; inversely to width, ten times that for LoRA."""
MAX_LEARNING_RATE = 2e-3
NEAR = 0.025
"""Of prior gain: a quarter of the effective tokens, which is less than the priors can tell, and not
worth hours."""
ABOUT_AS_FAST = 1.1
"""Predicted seconds are no better than that."""
MOST_TRIED = 2
"""Larger devices that are searched where nothing fits."""
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


@uncollected()
def search(request: Request) -> Planned:
    """Price all combinations and choose. Raises NoPlanFits, ValueError for impossible requests."""
    found = _search(request)
    if isinstance(found, Planned):
        return found
    larger = partial(_on_a_larger_device, request)
    raise NoPlanFits(least_that_would_do(request, found, larger))


def _search(request: Request) -> Planned | list[Refused]:
    """The plan, or where nothing fits what was lacking."""
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
    if not fitting and not refused and pricing.too_short:
        raise ValueError(pricing.too_short)
    if not fitting and not refused and pricing.unsuited:
        raise ValueError(
            f"training.online: {name_of(pricing.online)} does not do here: {pricing.unsuited}\n"
            "hint: another method, or another technique of training.memory"
        )
    if not fitting and not refused:
        tokens = request.pool.num_tokens if request.pool else UNLIMITED_TOKENS
        whose = "the pool's " if request.pool else ""
        raise ValueError(
            f"{whose}{tokens:,.0f} tokens do not fill one training step\n"
            f"hint: give {'a larger pool, or ' if request.pool else ''}a smaller "
            "training.max_length, training.per_device_train_batch_size or "
            "training.gradient_accumulation_steps"
        )
    if not fitting:
        return refused
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
        num_fitting=sum(
            combinations.num_fitting(request.most_allocated, partial(pricing.scoring_bytes, scorer))
            for _, scorer in scorers
        ),
        choice=choice,
        why=reasons(request, chosen, choice, training, Purposes(combinations, request).of(chosen)),
        training=training,
        combinations=combinations,
    )


def _on_a_larger_device(request: Request, refusal: Refused) -> str | None:
    """The smallest known GPU on which the request has a plan, with what that takes; None where none
    has. Its own list price counts."""
    gpu = request.device.kind == "cuda"  # a CPU's bytes say little of what a GPU would take
    alone = replace(refusal, setting=replace(refusal.setting, gradient_accumulation_steps=1))
    needed = alone.account(request).peak_memory_bytes if gpu else 0.0
    priced = sorted(
        ((device, dollars_per_hour(device)) for device in DEVICES.values()),
        key=lambda each: (each[0].memory_bytes, each[1] or math.inf),
    )
    tried = 0
    for device, price in priced:
        holds = allocatable(device.memory_bytes / MEMORY_MARGIN, device.kind)
        unknown = price is None and request.budget.dollars is not None
        if device.memory_bytes <= request.memory_limit or holds < needed or unknown:
            continue
        if tried == MOST_TRIED:
            break
        tried += 1
        try:
            found = _search(
                replace(
                    request,
                    device=device,
                    rates=Rates.hourly(price, device.tdp_watts),
                    budget=replace(request.budget, memory_bytes=None),
                )
            )
        except ValueError:  # of a technique that needs another kind of device
            continue
        if isinstance(found, Planned):
            total = found.chosen.total
            dollars = "" if total.dollars is None else quantities.format_dollars(total.dollars)
            return (
                f"plan for --device {device.name} ({quantities.format_bytes(device.memory_bytes)})"
                f": {found.chosen.name}, {quantities.format_seconds(total.seconds)}"
                f"{', ' if dollars else ''}{dollars}"
            )
    return None


def _worth_pricing(combinations: Combinations, request: Request) -> list[Held]:
    """Of each quality the fastest that fits, of each device memory that it takes the fastest; and
    the smallest of all, for what a larger budget would have to be."""
    limit, columns = request.most_allocated, combinations.columns
    size = len(combinations.blocks[0].micro_batches)
    peaks, seconds = columns.alone.reshape(-1, size), columns.seconds.reshape(-1, size)
    fits = peaks <= limit
    fastest = np.where(fits, seconds, np.inf).min(axis=1)
    least_bytes = peaks.min(axis=1)
    found = [
        (float(fastest[number]), float(least_bytes[number]), combinations.held[number])
        for number in np.flatnonzero(fits.any(axis=1))
    ]
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
    best = sorted(kept, key=lambda held: (-held.runs, -held.quality.mean))
    running = sum(held.runs for held in best)
    best = best[:running][:PRICED_WHOLE] + best[running:][: PRICED_WHOLE // 2]
    return best or [combinations.held[int(least_bytes.argmin())]]


def _finalists(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The best way to hold a step for each scorer, `uniform` first: it wins ties. Of those whose
    lower bound is no more than ``NEAR`` below that of the best, the fastest is taken; of those
    about as fast, the one that is surely worth most."""
    by_scorer: dict[str, list[Candidate]] = {}
    for candidate in ranked:
        by_scorer.setdefault(candidate.scorer, []).append(candidate)
    best = []
    for candidates in by_scorer.values():
        least = _surely(candidates[0]) - NEAR
        near = [c for c in candidates if _surely(c) >= least]
        near = [c for c in near if c.runs] or near  # what a run can train with first
        fastest = min(_seconds_a_token(c) for c in near)
        alike = [c for c in near if _seconds_a_token(c) <= ABOUT_AS_FAST * fastest]
        found = min(alike, key=lambda c: (-round(_worth(c), 3), c.peak_memory_bytes))
        best.append(_plainest(found, alike))
    return sorted(best, key=lambda c: (c.scorer != "uniform", -c.gain.mean))


def _worth(candidate: Candidate) -> float:
    """For choosing among those about as fast: a gain in limited time says who is faster, by less
    than is known."""
    quality = candidate.quality
    if candidate.binding in CLOCKED:
        return quality.mean - 0.1 * quality.stderr
    return _surely(candidate)


def _plainest(found: Candidate, alike: Sequence[Candidate]) -> Candidate:
    """Of those that train the same way, the one that does least to what is kept and to the loss, on
    devices that have all weights each before it cuts them."""
    same, how = ("trained", "weights", "states"), ("activations", "loss")

    def departs(candidate: Candidate) -> tuple[bool, int]:
        done = sum(candidate.techniques[kind] != REFERENCE[kind] for kind in how)
        return candidate.held.num_devices > 1, done

    others = [c for c in alike if all(c.techniques[k] == found.techniques[k] for k in same)]
    return min(others, key=lambda c: (departs(c), c.peak_memory_bytes))


def _seconds_a_token(candidate: Candidate) -> float:
    return candidate.step.seconds / candidate.step.tokens


def _surely(candidate: Candidate) -> float:
    """A gain less what the quality prior alone adds to its error."""
    quality = candidate.quality
    return candidate.gain.mean - 0.1 * quality.stderr / quality.mean


# -- the rest of the plan -----------------------------------------------------------------------


def training_of(chosen: Candidate, request: Request) -> Training:
    """The chosen combination as plan.yaml's ``training``, the remaining values by their rules."""
    c = chosen
    cooldown = int(COOLDOWN_SHARE * c.max_steps)
    eval_steps = int(request.fixed.get("training.eval_steps") or _eval_steps(c, request))
    trained: Any = c.held.techniques[0]
    states: Any = c.held.techniques[-1]
    rate = trained.learning_rate * LEARNING_RATE * 4096 / request.shape.hidden_size
    rate = min(rate, MAX_LEARNING_RATE)
    if not c.setting.zeroth_order:  # whose update is its own
        rate *= states.learning_rate
    return Training(
        memory=memory_plan_of(c.held.techniques),
        per_device_train_batch_size=c.per_device_train_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        devices=c.held.num_ranks,
        parallel="fsdp" if c.held.num_devices > 1 else "ddp",
        max_length=c.max_length,
        max_steps=c.ceiling,
        epochs=round(c.epochs * c.ceiling / c.max_steps, 3),
        learning_rate=float(f"{rate:.2g}"),
        warmup_steps=min(max(1, int(WARMUP_SHARE * c.max_steps)), c.max_steps - cooldown),
        cooldown_steps=cooldown,
        eval_steps=eval_steps,
        save_steps=int(request.fixed.get("training.save_steps") or eval_steps),
        online=request.fixed.get("training.online", Training().online),
    )


def _eval_steps(chosen: Candidate, request: Request) -> int:
    """Apart as the number of evaluations says. Where the user fixed save_steps, the next divisor of
    it (itself, where it is less): a checkpoint carries its evaluation."""
    apart = max(1, math.ceil(chosen.max_steps / max(chosen.num_evaluations - 1, 1)))
    save_steps = int(request.fixed.get("training.save_steps") or 0)
    divisors = (d for d in range(apart, save_steps + 1) if save_steps % d == 0)
    return next(divisors, save_steps or apart)
