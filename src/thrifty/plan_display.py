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
    unbeaten,
)
from thrifty.answers import Answers, Purposes
from thrifty.core import quantities
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.costs.hardware import DEVICES, cache_folder
from thrifty.display import table
from thrifty.held import Held
from thrifty.in_sequence import in_sequence
from thrifty.pareto import Point, pareto_front, thinned
from thrifty.planner import Planned
from thrifty.pricing import Candidate
from thrifty.request import Request

_SHOWN_CANDIDATES = 10
_SHOWN_SWAPS = 8
TERMS_SOURCE = {"runtime": "calibrated", "allocator": "calibrated"}
"""Where a term's bytes come from; all others are closed form."""
MAKES = {"fit": "makes it fit", "faster": "better per FLOP"}
"""What a technique is there for, as its file says."""
ORDER = "useful tokens x quality"


def plan_text(planned: Planned, request: Request) -> str:
    """The candidates, the choice with its memory by term, what binds and the ways out, and a line a
    choice why."""
    c = planned.chosen
    parts = [*_where(request), _candidates(planned, request), "", f"chosen: {c.name}"]
    runs = next((other for other in planned.candidates if other.runs), None)
    if not c.runs and runs is not None:
        size = quantities.format_bytes(runs.peak_memory_bytes)
        seconds = quantities.format_seconds(runs.total.seconds)
        parts.append(
            f"a run can train with: {runs.name}, {size}, {seconds}, gain {runs.gain.mean:.3f}"
        )
    parts += _memory(planned, request)
    parts.append(_front(planned, request))
    stages = [
        f"{name} {quantities.format_flops(cost.flops)}, {quantities.format_seconds(cost.seconds)}"
        for name, cost in c.by_stage.items()
        if cost.flops or cost.seconds
    ]
    parts.append(f"by stage, predicted: {'; '.join(stages)}")
    clock = "measured rates" if request.device.calibrated else "data-sheet rates"
    parts.append(f"  FLOPs are counted (closed form), seconds a roofline on {clock} (calibrated)")
    parts.append(f"what ends it: {c.binding}")
    if request.pool is not None:
        parts.append(in_sequence(planned, request).text)
    parts += ["", "why"]
    # What was not planned in turn stands above.
    parts += [f"  {key:<42} {reason}" for key, reason in planned.why.items() if key != "joint"]
    return "\n".join(parts)


def _where(request: Request) -> Iterator[str]:
    if request.device.kind == "cpu":
        yield (
            f"planned for this machine's CPU, {request.device.name}; "
            "--device NAME plans for another, as in --device h100\n"
        )


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
    for way in scoring_relief(c.account, request):
        yield f"  {way.text}"
    for swap in unbeaten(swaps(c, request, planned.combinations))[:_SHOWN_SWAPS]:
        yield f"  {_swap_text(swap)}"
    for other in elsewhere(request, planned.combinations, c.scoring_bytes):
        yield _elsewhere_text(other)


def _swap_text(swap: Swap) -> str:
    worth = "" if round(swap.quality, 2) == 1 else f", a token worth {swap.quality:.2f} as much"
    priced = "" if swap.runs else " (priced; a run cannot train with it yet)"
    name = f"{swap.name} with {swap.differs}" if swap.differs else swap.name
    return (
        f"{name} frees {quantities.format_bytes(swap.frees_bytes)} for "
        f"{100 * swap.slows:+.0f}% time{worth}{priced}"
    )


def _elsewhere_text(other: Elsewhere) -> str:
    size = quantities.format_bytes(other.memory_bytes)
    if other.techniques is None:
        return f"on {other.device} ({size}): nothing fits"
    emulated = not DEVICES[other.device].flops_per_second["bfloat16"]
    slowly = ", without instructions for bfloat16" * emulated
    return (
        f"on {other.device} ({size}{slowly}) would fit: {' '.join(other.techniques.values())} in "
        f"micro-batches of {other.micro_batch}"
    )


def _candidates(planned: Planned, request: Request) -> str:
    shown: list[Candidate] = [planned.chosen]
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in planned.candidates:
        kind = candidate.scorer, " ".join(candidate.techniques.values())
        best.setdefault(kind, candidate)
    shown += [c for c in best.values() if c is not planned.chosen][: _SHOWN_CANDIDATES - 1]
    resource, purposes = _scarce(planned.chosen), Purposes(planned.combinations, request)
    headers = (
        "", "candidate", "memory", "steps", "tokens", "FLOPs", "time", "$", "a useful token",
        "quality", "gain (a guess)", "what for",
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
            _microseconds(c.seconds_per_useful_token)
            if resource == "seconds"
            else quantities.format_flops(c.flops_per_useful_token),
            f"{c.quality.mean:.2f} ± {c.quality.stderr:.2f}",
            f"{c.gain.mean:.3f}" + (f" ± {c.gain.stderr:.3f}" if c.gain.stderr >= 5e-4 else ""),
            _what_for(c, purposes.of(c)),
        )
        for c in shown
    ]
    fitting = f"{planned.num_fitting:,} of {planned.num_combinations:,} combinations fit"
    legend = "the fastest of each quality and size (4x2: micro-batch 4, accumulated twice)"
    order = (
        f"in order of what the budget buys, {ORDER}, * the fastest within the priors' error of the "
        f"best; quality is a prior that {cache_folder() / 'priors.yaml'} edits"
    )
    listed = table(headers, rows, right="llrrrrrrrrrl")
    return f"{fitting}; {legend}:\n{listed}\n{order}"


def _what_for(candidate: Candidate, answers: Answers) -> str:
    pairs = ((MAKES["fit"], answers.makes_it_fit), (MAKES["faster"], answers.better_per_flop))
    told = [f"{what}: {', '.join(names)}" for what, names in pairs if names]
    return "; ".join(told if candidate.runs else [*told, "priced only"])


def _scarce(chosen: Candidate) -> str:
    """What a useful token is priced in: the resource that binds."""
    return "flops" if chosen.binding == "flops" else "seconds"


def _microseconds(seconds: float) -> str:
    micro = 1e6 * seconds
    return f"{micro:,.0f} µs" if micro >= 100 else f"{micro:.3g} µs"


def _front(planned: Planned, request: Request) -> str:
    front = pareto_front(planned.combinations, request.most_allocated)
    rows = [
        (
            "",
            quantities.format_bytes(point.memory_bytes),
            _microseconds(point.seconds_per_useful_token),
            f"{point.held.quality.mean:.2f} ± {point.held.quality.stderr:.2f}",
            point.held.describe(str(point.micro_batch)),
        )
        for point in thinned(front)
    ]
    headers = ("", "memory", "a useful token", "quality", "way, its micro-batch last")
    listed = table(headers, rows, right="lrrrl")
    return (
        f"memory against time: {len(front):,} ways are beaten by none in memory, time and quality; "
        f"of each step of memory, the one that buys most:\n{listed}"
    )


def plan_json(planned: Planned, request: Request, model: Mapping[str, Any]) -> dict[str, Any]:
    c = planned.chosen
    total, device = c.total, c.device_memory
    phase, term = binding_term(c)
    purposes = Purposes(planned.combinations, request)
    return {
        "model": dict(model),
        "chosen": _candidate_json(c, purposes),
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
        "in_sequence": _in_sequence_json(planned, request),
        "binding_memory": {"phase": phase, "term": term},
        "relief": [vars(way) for way in scoring_relief(c.account, request)],
        "swaps": [vars(swap) for swap in swaps(c, request, planned.combinations)],
        "elsewhere": [
            vars(other) for other in elsewhere(request, planned.combinations, c.scoring_bytes)
        ],
        "pareto": [
            _point_json(point)
            for point in pareto_front(planned.combinations, request.most_allocated)
        ],
        "num_combinations": planned.num_combinations,
        "num_fitting": planned.num_fitting,
        "refused": dict(planned.combinations.refused),
        "rank_by": {
            "order": ORDER,
            "resource": _scarce(c),
            "priors": str(cache_folder() / "priors.yaml"),
        },
        "candidates": [_candidate_json(candidate, purposes) for candidate in planned.candidates],
        "why": dict(planned.why),
    }


def _in_sequence_json(planned: Planned, request: Request) -> dict[str, Any] | None:
    """What one decision after the other would have planned; None without a pool to choose from."""
    if request.pool is None:
        return None
    found = in_sequence(planned, request)
    return {
        "scorer": found.scorer,
        "name": found.candidate and found.candidate.name,
        "differs": {what: list(both) for what, both in found.differs.items()},
        "effective_tokens_ratio": found.more_tokens,
        "seconds_per_useful_token_ratio": found.more_seconds,
        "text": found.text,
    }


def _quality_json(held: Held) -> dict[str, Any]:
    worth = held.quality
    return {"mean": worth.mean, "stderr": worth.stderr, "source": worth.source}


def _point_json(point: Point) -> dict[str, Any]:
    held = point.held
    return {
        "techniques": dict(held.technique_names),
        "masked": held.masked,
        "num_devices": held.num_ranks,
        "runs": held.runs,
        "micro_batch": point.micro_batch,
        "memory_bytes": point.memory_bytes,
        "seconds_per_useful_token": point.seconds_per_useful_token,
        "flops_per_useful_token": point.flops_per_useful_token,
        "quality": _quality_json(held),
    }


def _candidate_json(c: Candidate, purposes: Purposes) -> dict[str, Any]:
    answers = purposes.of(c)
    return {
        "name": c.name,
        "scorer": c.scorer,
        "techniques": dict(c.techniques),
        "tags": {
            kind: MAKES[technique.makes]
            for kind, technique in zip(MEMORY_KINDS, c.held.techniques, strict=True)
        },
        "makes_it_fit": list(answers.makes_it_fit),
        "better_per_flop": list(answers.better_per_flop),
        "runs": c.runs,
        "num_devices": c.held.num_ranks,
        "quality": _quality_json(c.held),
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
        "seconds_per_useful_token": c.seconds_per_useful_token,
        "flops_per_useful_token": c.flops_per_useful_token,
        "gain": c.gain.mean,
        "gain_stderr": c.gain.stderr,
        "binding": c.binding,
    }
