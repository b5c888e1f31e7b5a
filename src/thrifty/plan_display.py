"""A plan as people read it, and as programs do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from thrifty.advice import (
    Elsewhere,
    Swap,
    binding_term,
    elsewhere,
    scoring_relief,
    swaps,
)
from thrifty.core import quantities
from thrifty.display import table
from thrifty.planner import Planned
from thrifty.pricing import Candidate, Request

_SHOWN_CANDIDATES = 10
_SHOWN_SWAPS = 5
TERMS_SOURCE = {"runtime": "calibrated", "allocator": "calibrated"}
"""Where a term's bytes come from; all others are closed form."""
MAKES = {"fit": "makes it fit", "faster": "better per FLOP"}


def plan_text(planned: Planned, request: Request) -> str:
    """The candidates, the choice with its memory by term, what binds and the ways out, and a line a
    choice why."""
    c = planned.chosen
    parts = [_candidates(planned), "", f"chosen: {c.name}"]
    runs = next((other for other in planned.candidates if other.runs), None)
    if not c.runs and runs is not None:
        size = quantities.format_bytes(runs.peak_memory_bytes)
        seconds = quantities.format_seconds(runs.total.seconds)
        parts.append(
            f"a run can train with: {runs.name}, {size}, {seconds}, gain {runs.gain.mean:.3f}"
        )
    parts += _memory(planned, request)
    stages = [
        f"{name} {quantities.format_flops(cost.flops)}, {quantities.format_seconds(cost.seconds)}"
        for name, cost in c.by_stage.items()
        if cost.flops or cost.seconds
    ]
    parts.append(f"by stage, predicted: {'; '.join(stages)}")
    clock = "measured rates" if request.device.calibrated else "data-sheet rates"
    parts.append(f"  FLOPs are counted (closed form), seconds a roofline on {clock} (calibrated)")
    parts.append(f"what ends it: {c.binding}")
    parts += ["", "why"]
    parts += [f"  {key:<42} {reason}" for key, reason in planned.why.items()]
    return "\n".join(parts)


def _memory(planned: Planned, request: Request) -> Iterator[str]:
    c = planned.chosen
    shown = quantities.format_bytes
    terms = [
        f"{name} {shown(size)}"
        for name, size in sorted(c.memory.items(), key=lambda item: -item[1])
        if size
    ]
    device = c.device_memory
    yield f"peak memory, predicted: {shown(device.device)} = {' + '.join(terms)}"
    yield (
        f"  allocated {shown(device.allocated)} (closed form), reserved {shown(device.reserved)} "
        f"and on the device {shown(device.device)} (calibrated), {shown(device.low)} to "
        f"{shown(device.high)} nine times in ten"
    )
    phases = [f"{name} {shown(c.account.phase_bytes(name))}" for name in c.account.phases]
    yield f"  by phase: {', '.join(phases)}"
    phase, term = binding_term(c)
    yield f"the binding term is {term.replace('_', ' ')} at {phase}"
    for way in scoring_relief(c, request):
        yield f"  {way}"
    for swap in swaps(c, planned.combinations)[:_SHOWN_SWAPS]:
        yield f"  {_swap_text(swap)}"
    for other in elsewhere(request, planned.combinations):
        yield _elsewhere_text(other)


def _swap_text(swap: Swap) -> str:
    worth = "" if round(swap.quality, 2) == 1 else f", a token worth {swap.quality:.2f} as much"
    priced = "" if swap.runs else " (priced; a run cannot train with it yet)"
    return (
        f"{swap.name} frees {quantities.format_bytes(swap.frees_bytes)} for "
        f"{100 * swap.slows:+.0f}% time{worth}{priced}"
    )


def _elsewhere_text(other: Elsewhere) -> str:
    size = quantities.format_bytes(other.memory_bytes)
    if other.techniques is None:
        return f"on {other.device} ({size}): nothing fits"
    return (
        f"on {other.device} ({size}) would fit: {' '.join(other.techniques.values())} in "
        f"micro-batches of {other.micro_batch}"
    )


def _candidates(planned: Planned) -> str:
    shown: list[Candidate] = [planned.chosen]
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in planned.candidates:
        kind = candidate.scorer, " ".join(candidate.techniques.values())
        best.setdefault(kind, candidate)
    shown += [c for c in best.values() if c is not planned.chosen][: _SHOWN_CANDIDATES - 1]
    headers = (
        "", "candidate", "memory", "steps", "tokens", "FLOPs", "time", "$", "quality",
        "gain (a guess)", "",
    )  # fmt: skip
    rows = [
        (
            "*" if c is planned.chosen else "",
            c.name,
            quantities.format_bytes(c.peak_memory_bytes),
            f"{c.max_steps:,}",
            quantities.format_tokens(c.total.tokens),
            quantities.format_flops(c.total.flops),
            quantities.format_seconds(c.total.seconds),
            "?" if c.total.dollars is None else quantities.format_dollars(c.total.dollars),
            f"{c.quality.mean:.2f} ± {c.quality.stderr:.2f}",
            f"{c.gain.mean:.3f}" + (f" ± {c.gain.stderr:.3f}" if c.gain.stderr >= 5e-4 else ""),
            MAKES[c.makes] + ("" if c.runs else ", priced only"),
        )
        for c in shown
    ]
    fitting = f"{planned.num_fitting:,} of {planned.num_combinations:,} combinations fit"
    legend = "the fastest of each quality and size (4x2: micro-batch 4, accumulated twice)"
    return f"{fitting}; {legend}:\n" + table(headers, rows, right="llrrrrrrrrl")


def plan_json(planned: Planned, request: Request, model: Mapping[str, Any]) -> dict[str, Any]:
    c = planned.chosen
    total, device = c.total, c.device_memory
    phase, term = binding_term(c)
    return {
        "model": dict(model),
        "chosen": _candidate_json(c),
        "predicted": {
            "peak_memory_bytes": c.peak_memory_bytes,
            "peak_memory_bytes_by_term": dict(c.memory),
            "source_by_term": {name: TERMS_SOURCE.get(name, "closed form") for name in c.memory},
            "allocated_bytes": device.allocated,
            "reserved_bytes": device.reserved,
            "device_bytes": device.device,
            "device_bytes_interval": [device.low, device.high],
            "allocated_bytes_by_phase": {
                name: c.account.phase_bytes(name) for name in c.account.phases
            },
            "flops": total.flops,
            "seconds": total.seconds,
            "tokens": total.tokens,
            "dollars": total.dollars,
            "joules": total.joules,
            "by_stage": {name: cost.to_dict() for name, cost in c.by_stage.items()},
        },
        "binding": c.binding,
        "binding_memory": {"phase": phase, "term": term},
        "swaps": [vars(swap) for swap in swaps(c, planned.combinations)],
        "elsewhere": [vars(other) for other in elsewhere(request, planned.combinations)],
        "num_combinations": planned.num_combinations,
        "num_fitting": planned.num_fitting,
        "refused": dict(planned.combinations.refused),
        "candidates": [_candidate_json(candidate) for candidate in planned.candidates],
        "why": dict(planned.why),
    }


def _candidate_json(c: Candidate) -> dict[str, Any]:
    return {
        "name": c.name,
        "scorer": c.scorer,
        "techniques": dict(c.techniques),
        "makes": c.makes,
        "runs": c.runs,
        "quality": c.quality.mean,
        "quality_stderr": c.quality.stderr,
        "quality_source": c.quality.source,
        "method": c.method,
        "dtype": c.dtype,
        "activation_checkpointing": c.activation_checkpointing,
        "per_device_train_batch_size": c.per_device_train_batch_size,
        "gradient_accumulation_steps": c.gradient_accumulation_steps,
        "max_length": c.max_length,
        "max_steps": c.max_steps,
        "epochs": c.epochs,
        "keep_tokens": c.keep_tokens if c.keep_tokens < float("inf") else None,
        "peak_memory_bytes": c.peak_memory_bytes,
        "flops": c.total.flops,
        "seconds": c.total.seconds,
        "dollars": c.total.dollars,
        "seconds_per_useful_token": c.step.seconds / c.useful_tokens,
        "flops_per_useful_token": c.step.flops / c.useful_tokens,
        "gain": c.gain.mean,
        "gain_stderr": c.gain.stderr,
        "binding": c.binding,
    }
