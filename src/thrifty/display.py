"""What commands print for people: tables on standard output, lines of talk on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from thrifty.core import quantities
from thrifty.data.inert import for_terminal


def say(line: str) -> None:
    """Talk: goes to standard error, a line at a time. Where that cannot be written (a log on a full
    disk, a pipe that is closed) it is lost, and nothing else."""
    with suppress(OSError):
        print(for_terminal(line), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A result that is for people: goes to standard output."""
    print(for_terminal(text))


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


def methods_text(methods: Sequence[Mapping[str, str]]) -> str:
    rows = [(m["kind"], m["name"], m["cost_class"], m["summary"], m["source"]) for m in methods]
    return table(("kind", "name", "cost", "what it does", "source"), rows)


def device_text(facts: Mapping[str, Any]) -> str:
    """A line a fact, in units that people read; what is unknown says so."""

    def shown(value: float | None, form: Callable[[float], str], unit: str = "") -> str:
        return "unknown" if value is None else form(value) + unit

    rates, factor = facts["flops_per_second"].items(), facts["memory_factor"]
    more = f"predicted peaks count {factor:.2f} times, since a run ran out"
    learnt = {} if factor == 1.0 else {"memory needed": more}
    lines = {
        "name": f"{facts['name']} ({facts['kind']})",
        "memory": quantities.format_bytes(facts["memory_bytes"]),
        **{f"peak, {dtype}": f"{quantities.format_flops(rate)}/s" for dtype, rate in rates},
        "bandwidth": f"{quantities.format_bytes(facts['bytes_per_second'])}/s",
        **learnt,
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
    """No progress bars of loading and saving, which say nothing; warnings and errors stay, but for
    those of ``quiet_transformers``."""
    import datasets

    quiet_transformers()
    datasets.disable_progress_bars()


def quiet_transformers() -> None:
    """No progress bars, nor a warning that PEFT causes by asking transformers something by its old
    name."""
    import logging
    import warnings

    import transformers

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
    # torchao, where it is installed, tells at import which of its kernels are for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    transformers.logging.disable_progress_bar()
