"""A measured model as people read it, and as programs do: what was measured, what is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from thrifty.core import quantities
from thrifty.display import table
from thrifty.measured_plan import DTYPE, MeasuredPlan, Way

_TERMS = ("weights", "gradients", "optimizer_states", "activations")


def measured_text(plan: MeasuredPlan) -> str:
    return "\n".join(_lines(plan))


def _lines(plan: MeasuredPlan) -> Iterator[str]:
    model, shown = plan.model, quantities.format_bytes
    parts = {part: size for part, size in model.parameters_by_part.items() if size}
    yield (
        f"{model.config['model_type']}: {model.num_parameters:,} parameters, counted on the meta "
        "device"
    )
    yield "  " + ", ".join(f"{part} {size:,}" for part, size in parts.items())
    measured = [way for way in plan.ways if not way.failed]
    if measured:
        yield ""
        yield (
            f"rows of {plan.sequence:,} tokens, {DTYPE}, AdamW, no accumulation; "
            f"{shown(measured[0].limit)} for tensors of {shown(plan.memory_limit)} on "
            f"{plan.device.name}"
        )
        yield _ways_table(plan, measured)
        yield ""
        yield "memory by phase and term at that micro-batch, measured on the meta device:"
        yield _phases_table(measured)
        yield ""
        depths = " and ".join(map(str, model.depths))
        carried = "" if len(model.depths) == 1 else f", carried on to {model.num_layers}"
        yield (
            f"measured on the meta device at {depths} layers{carried}, in {plan.seconds:.1f} s; "
            "FLOPs of dense attention"
        )
        yield "predicted: time, as FLOPs over the device's rate and nothing else"
    for way in measured:
        yield from _remarks(way)
    if plan.failed:
        yield f"no step could be measured: {plan.failed}"
    else:
        yield from (f"{w.name} could not be measured: {w.failed}" for w in plan.ways if w.failed)


def _ways_table(plan: MeasuredPlan, ways: list[Way]) -> str:
    headers = [
        "", "largest micro-batch", "peak (measured)", "at", "FLOPs/token (measured)",
        "tokens/s (predicted)",
    ]  # fmt: skip
    limited = any(plan.tokens(way) is not None for way in ways)
    headers += ["tokens in budget", "time (predicted)"] if limited else []
    rows = []
    for way in ways:
        row = [
            way.name,
            f"{way.micro_batch:,}" if way.fits else "none: does not fit at 1",
            quantities.format_bytes(way.account.peak_memory_bytes),
            way.account.peak_phase,
            quantities.format_flops(way.flops_per_token),
            quantities.short(1.0 / plan.seconds_of(way.flops_per_token)),
        ]
        tokens = plan.tokens(way)
        if tokens is not None:
            row.append(quantities.format_tokens(tokens))
            row.append(quantities.format_seconds(plan.seconds_of(tokens * way.flops_per_token)))
        rows.append(row)
    return table(headers, rows, right="lrrlrrrr")


def _phases_table(ways: list[Way]) -> str:
    rows = [
        (
            f"{way.name}, {way.micro_batch}",
            phase,
            quantities.format_bytes(sum(terms.values())),
            *(quantities.format_bytes(terms[term]) for term in _TERMS),
        )
        for way in ways
        for phase, terms in way.account.phases.items()
    ]
    names = (term.replace("_", " ") for term in _TERMS)
    return table(("", "phase", "bytes", *names), rows, right="llrrrrr")


def _remarks(way: Way) -> Iterator[str]:
    if way.closed_form is not None:
        size, flops = way.closed_form
        yield (
            f"{way.name}: the closed form is off by "
            f"{size / way.account.peak_memory_bytes - 1.0:+.2%} in bytes and "
            f"{flops / way.flops_per_token - 1.0:+.2%} in FLOPs"
        )


def measured_json(plan: MeasuredPlan) -> dict[str, Any]:
    model = plan.model
    depths = model.depths if any(not way.failed for way in plan.ways) else None
    return {
        "model": {
            "path": plan.path,
            "revision": plan.revision,
            "model_type": model.config["model_type"],
            "num_parameters": model.num_parameters,
            "num_parameters_by_part": model.parameters_by_part,
        },
        "measured": {
            "source": "measured on the meta device",
            "failed": plan.failed or None,
            "dtype": DTYPE,
            "max_length": plan.sequence,
            "num_layers": model.num_layers if depths else None,
            "traced_num_layers": depths and list(depths),
            "memory_bytes": plan.memory_limit,
            "device": plan.device.name,
            "seconds": plan.seconds,
        },
        "candidates": [_way_json(plan, way) for way in plan.ways],
    }


def _way_json(plan: MeasuredPlan, way: Way) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": way.name,
        "method": way.trained,
        "dtype": DTYPE,
        "activation_checkpointing": way.recompute,
        "failed": way.failed or None,
    }
    if way.failed:
        return facts
    tokens, closed = plan.tokens(way), way.closed_form
    return facts | {
        "fits": way.fits,
        "per_device_train_batch_size": way.micro_batch if way.fits else None,
        "peak_memory_bytes": way.account.peak_memory_bytes,
        "peak_memory_bytes_by_term": way.account.by_term,
        "bytes_by_phase_and_term": way.account.phases,
        "bytes_by_micro_batch_and_phase": {
            str(size): {phase: each.phase_bytes(phase) for phase in each.phases}
            for size in sorted({1, way.micro_batch})
            for each in (way.measured.account(size),)
        },
        "memory_source": "measured on the meta device",
        "flops_per_token": way.flops_per_token,
        "flops_per_token_without_attention": way.flops.token,
        "flops_per_token_and_key": way.flops.pair,
        "flops_source": "measured on the meta device",
        "seconds_per_token": plan.seconds_of(way.flops_per_token),
        "tokens": tokens,
        "flops": None if tokens is None else tokens * way.flops_per_token,
        "seconds": None if tokens is None else plan.seconds_of(tokens * way.flops_per_token),
        "seconds_source": "predicted: FLOPs over the device's rate",
        "closed_form": closed and {"peak_memory_bytes": closed[0], "flops_per_token": closed[1]},
    }
