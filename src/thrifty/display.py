"""What commands print for people: tables on standard output, lines of talk on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from thrifty.core import quantities
from thrifty.planner import Planned
from thrifty.pricing import Candidate

_SHOWN_CANDIDATES = 8


def say(line: str) -> None:
    """Talk: goes to standard error, a line at a time."""
    print(line, file=sys.stderr, flush=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> str:
    """Plain aligned columns; those whose letter in ``right`` is "r" to the right."""
    lines = [list(headers), *([str(c) for c in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    out = []
    for n, line in enumerate(lines):
        cells = [
            cell.rjust(w) if i < len(right) and right[i] == "r" else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
        if n == 0:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out)


def plan_text(planned: Planned) -> str:
    """The candidates, the choice with its memory by term, what binds, and a line a choice why."""
    c = planned.chosen
    parts = [_candidates(planned), "", f"chosen: {c.name}"]
    terms = [
        f"{name} {quantities.format_bytes(size)}"
        for name, size in sorted(c.memory.items(), key=lambda item: -item[1])
        if size
    ]
    parts.append(
        f"peak memory, predicted: {quantities.format_bytes(c.peak_memory_bytes)}"
        f" = {' + '.join(terms)}"
    )
    stages = [
        f"{name} {quantities.format_flops(cost.flops)}, {quantities.format_seconds(cost.seconds)}"
        for name, cost in c.by_stage.items()
        if cost.flops or cost.seconds
    ]
    parts.append(f"by stage, predicted: {'; '.join(stages)}")
    parts.append(f"what ends it: {c.binding}")
    parts += ["", "why"]
    parts += [f"  {key:<42} {reason}" for key, reason in planned.why.items()]
    return "\n".join(parts)


def _candidates(planned: Planned) -> str:
    shown: list[Candidate] = [planned.chosen]
    best: dict[tuple[str, str, str, bool], Candidate] = {}
    for candidate in planned.candidates:
        kind = (
            candidate.scorer,
            candidate.method,
            candidate.dtype,
            candidate.activation_checkpointing,
        )
        best.setdefault(kind, candidate)
    shown += [c for c in best.values() if c is not planned.chosen][: _SHOWN_CANDIDATES - 1]
    headers = ("", "candidate", "memory", "steps", "tokens", "FLOPs", "time", "$", "gain (prior)")
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
            f"{c.gain.mean:.3f} ± {c.gain.stderr:.3f}",
        )
        for c in shown
    ]
    fitting = f"{len(planned.candidates):,} of {planned.num_combinations:,} combinations fit"
    return f"{fitting}; the best of each kind:\n" + table(headers, rows, right="llrrrrrrr")


def plan_json(planned: Planned, model: Mapping[str, Any]) -> dict[str, Any]:
    c = planned.chosen
    total = c.total
    return {
        "model": dict(model),
        "chosen": _candidate_json(c),
        "predicted": {
            "peak_memory_bytes": c.peak_memory_bytes,
            "peak_memory_bytes_by_term": dict(c.memory),
            "flops": total.flops,
            "seconds": total.seconds,
            "tokens": total.tokens,
            "dollars": total.dollars,
            "joules": total.joules,
            "by_stage": {name: cost.to_dict() for name, cost in c.by_stage.items()},
        },
        "binding": c.binding,
        "num_combinations": planned.num_combinations,
        "candidates": [_candidate_json(candidate) for candidate in planned.candidates],
        "why": dict(planned.why),
    }


def _candidate_json(c: Candidate) -> dict[str, Any]:
    return {
        "name": c.name,
        "scorer": c.scorer,
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
        "gain": c.gain.mean,
        "gain_stderr": c.gain.stderr,
        "binding": c.binding,
    }


def methods_text(methods: Sequence[Mapping[str, str]]) -> str:
    rows = [(m["kind"], m["name"], m["cost_class"], m["summary"], m["source"]) for m in methods]
    return table(("kind", "name", "cost", "what it does", "source"), rows)


def device_text(facts: Mapping[str, Any]) -> str:
    """A line a fact, in units that people read; what is unknown says so."""

    def shown(value: float | None, form: Callable[[float], str], unit: str = "") -> str:
        return "unknown" if value is None else form(value) + unit

    rates = facts["flops_per_second"].items()
    lines = {
        "name": f"{facts['name']} ({facts['kind']})",
        "memory": quantities.format_bytes(facts["memory_bytes"]),
        **{f"peak, {dtype}": f"{quantities.format_flops(rate)}/s" for dtype, rate in rates},
        "bandwidth": f"{quantities.format_bytes(facts['bytes_per_second'])}/s",
        "launch": f"{1e6 * facts['operation_seconds']:.3g} µs an operation",
        "power": shown(facts["tdp_watts"], lambda watts: f"{watts:g} W"),
        "price": shown(facts["dollars_per_hour"], quantities.format_dollars, " an hour"),
        "source": facts["source"],
    }
    if facts["measured_at"]:
        lines["measured"] = facts["measured_at"] + (
            ", machine busy: repeats differed by more than 10%" if facts["machine_busy"] else ""
        )
    return "\n".join(f"{key:<16} {value}" for key, value in lines.items())


def quiet_libraries() -> None:
    """No progress bars of loading and saving, which say nothing; warnings and errors stay."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
