"""Published peaks of memory against what is predicted for them, by thrifty and by its peers.

    python bench/published_memory.py [--tables FILE.csv ...] [--ftuneai PYTHON] [--deepspeed PYTHON]

The tables are not part of the project. Rows that do not state their setting are listed first, with
the first rule that they break (``published_rows.py``); rows of other implementations stand in a
table of their own, since they keep other tensors than Hugging Face's do. A row whose setting
thrifty has no word for is shown with what is missing, and counts for its peers.

Each number is compared with its own quantity: `allocated`, what tensors hold, and `active`, which
adds the padding of blocks, with thrifty's account; `reserved` with what `costs/allocator.py` makes
of it, its share calibrated on the other reserved rows of that table, never on the row itself;
`device` with the CUDA context as well.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import peers
from material import heading
from published_rows import (
    LENGTHS,
    RULES,
    UNSTATED_LENGTH,
    NotYet,
    Row,
    beside,
    job_of,
    reason_out,
    setting_of,
)
from thrifty import display
from thrifty.costs.allocator import RESERVED_SHARE
from thrifty.costs.memory import RUNTIME_BYTES, account

TABLES = Path(__file__).parents[2] / "shared" / "research" / "memory_tables.csv"

Estimator = Callable[[peers.Job], float | None]


def allocated_bytes(row: Row) -> float:
    return account(row.shape, setting_of(row)).peak_memory_bytes + beside(row)


def reserved_shares(rows: Iterable[Row]) -> dict[int, float]:
    """By line, of rows that give what was reserved: how much that is over what tensors take."""
    found = {}
    for row in rows:
        if row.quantity == "reserved":
            with contextlib.suppress(NotYet):
                assert row.bytes
                found[row.line] = row.bytes / allocated_bytes(row) - 1.0
    return found


def thrifty_bytes(row: Row, shares: dict[int, float]) -> float:
    """Of the row's own quantity; of reserved bytes the share is the other rows'."""
    allocated = allocated_bytes(row)
    if row.quantity not in ("reserved", "device"):
        return allocated
    others = [share for line, share in shares.items() if line != row.line]
    share = statistics.mean(others) if others else RESERVED_SHARE["cuda"][0]
    return allocated * (1.0 + share) + RUNTIME_BYTES["cuda"] * (row.quantity == "device")


def calibration(rows: Sequence[Row], shares: dict[int, float]) -> str:
    """What the reserved rows say about the allocator."""
    mean, stderr = RESERVED_SHARE["cuda"]
    told = f"costs/allocator.py takes {mean:.1%} with a standard error of {stderr:.1%}"
    if not shares:
        return f"no row gives reserved bytes; {told}"
    listed = ", ".join(f"{row.title} {shares[row.line]:+.2%}" for row in rows if row.line in shares)
    spread = ""
    if len(shares) > 1:
        error = statistics.stdev(shares.values()) * (1 + 1 / len(shares)) ** 0.5
        spread = f", of one more such row ±{error:.1%}"
    return (
        f"Reserved over allocated, {len(shares)} rows: {listed};\n"
        f"mean {statistics.mean(shares.values()):+.2%}{spread}; {told}"
    )


def exclusions(rows: Sequence[Row]) -> str:
    """Every row left out, by reason and source."""
    found = Counter((reason_out(row), row["source"]) for row in rows if reason_out(row))
    order = {reason: number for number, (reason, _) in enumerate(RULES)}
    lines = [
        (reason, str(count), source)
        for (reason, source), count in sorted(found.items(), key=lambda item: order[item[0][0]])
    ]
    head = f"{sum(found.values())} of {len(rows)} rows are left out"
    return f"{head}\n{display.table(('reason', 'rows', 'source'), lines, right='lr')}"


Errors = dict[str, dict[int, float]]
"""By estimator and line of the table."""


def compared(rows: Sequence[Row], estimators: dict[str, Estimator]) -> Errors:
    """Prints a line a row; returns each estimator's errors."""
    errors: Errors = {name: {} for name in ("thrifty", *estimators)}
    lines, shares = [], reserved_shares(rows)
    for row in rows:
        assert row.bytes
        found, remark = {}, ""
        try:
            found["thrifty"] = thrifty_bytes(row, shares)
        except NotYet as missing:
            remark = f"not yet expressible: {missing}"
        if (job := job_of(row)) is not None:
            answers = {name: estimator(job) for name, estimator in estimators.items()}
            found |= {name: answer for name, answer in answers.items() if answer is not None}
        for name, answer in found.items():
            errors[name][row.line] = answer / row.bytes - 1
        sizes = (row.bytes, found.get("thrifty"))
        lines.append(
            (
                row.title,
                row.quantity,
                *(f"{size / 2**30:.2f}" if size else "-" for size in sizes),
                *(
                    f"{mine[row.line]:+.1%}" if row.line in mine else "-"
                    for mine in errors.values()
                ),
                remark,
            )
        )
    headers = ("row", "quantity", "measured", "predicted", *errors, "")
    print(display.table(headers, lines, right="ll" + "r" * (2 + len(errors))))
    print(f"\n{calibration(rows, shares)}")
    return errors


def open_lengths(rows: Iterable[Row]) -> str:
    """Rows that leave their length open and nothing else, at a short and a long one."""
    lines = []
    for row in rows:
        if reason_out(row) != UNSTATED_LENGTH:
            continue
        ends = [replace(row, cells=row.cells | {"seq_len": str(length)}) for length in LENGTHS]
        if any(map(reason_out, ends)):
            continue
        try:
            low, high = (thrifty_bytes(end, {}) for end in ends)
        except NotYet:
            continue
        assert row.bytes
        sizes = [f"{size / 2**30:.2f}" for size in (row.bytes, low, high)]
        off = [f"{size / row.bytes - 1:+.1%}" for size in (low, high)]
        title = f"{row['model']} {row['method']}, {row['optimizer']}"
        lines.append((title, row.implementation, row.quantity, *sizes, *off))
    if not lines:
        return "none"
    lengths = [f"at {length}" for length in LENGTHS]
    headers = ("row", "ran", "quantity", "measured", *lengths, *lengths)
    return display.table(headers, lines, right="lll" + "r" * 5)


def summary(errors: Errors, absent: set[str]) -> str:
    """Each over the rows that it answers, beside thrifty over those of them that it answers too."""
    lines = []
    for name, found in errors.items():
        if not found:
            lines.append((name, "0", "not installed" if name in absent else "-", "-", "-", "-"))
            continue
        sizes = [abs(error) for error in found.values()]
        shared = [abs(error) for line, error in errors["thrifty"].items() if line in found]
        lines.append(
            (
                name,
                str(len(found)),
                f"{statistics.median(sizes):.1%}",
                f"{sum(size <= 0.1 for size in sizes) / len(sizes):.0%}",
                f"{max(found.values(), key=abs):+.0%}",
                f"{statistics.median(shared):.1%} of {len(shared)}" if shared else "-",
            )
        )
    headers = ("estimator", "rows", "median |error|", "within 10%", "worst", "thrifty there")
    return display.table(headers, lines, right="lrrrrr")


def show(tables: Sequence[Path], ftuneai: str = "", deepspeed: str = "") -> int:
    """Prints it all; ``ftuneai``, ``deepspeed``: a Python that has the package."""
    missing = [str(path) for path in tables if not path.exists()]
    if missing:
        print(f"error: no table of published rows at {', '.join(missing)}", file=sys.stderr)
        print("hint: name the files with --tables; the project holds no copy", file=sys.stderr)
        return 4
    cells: list[dict[str, str]] = []
    for path in tables:
        with path.open(encoding="utf-8", newline="") as lines:
            cells += csv.DictReader(lines)
    rows = [Row(line, each) for line, each in enumerate(cells)]
    estimators: dict[str, Estimator] = {
        "accelerate": peers.accelerate,
        "unsloth": peers.unsloth,
        "llamafactory": peers.llamafactory,
        "deepspeed": lambda job: peers.deepspeed(job, deepspeed),
        "eleutherai": peers.eleutherai,
        "ftuneai": lambda job: peers.ftuneai(job, ftuneai) if ftuneai else None,
    }
    uninstalled = set() if ftuneai else {"ftuneai"}
    print(heading("Published peaks of training on one GPU, GiB"))
    print(f"\n{exclusions(rows)}")
    kept = [row for row in rows if not reason_out(row)]
    both: Errors = {}
    for title, here in (
        ("Hugging Face implementations", [row for row in kept if row.implementation == "hf"]),
        ("Other implementations", [row for row in kept if row.implementation != "hf"]),
    ):
        print(f"\n{title}: {len(here)} rows")
        errors = compared(here, estimators)
        print(f"\n{summary(errors, uninstalled)}")
        both = {name: both.get(name, {}) | found for name, found in errors.items()}
    print(f"\nBoth tables\n{summary(both, uninstalled)}")
    print(f"\nRows that leave their length open alone\n{open_lengths(rows)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", type=Path, nargs="+", default=[TABLES])
    parser.add_argument("--ftuneai", default="", help="a Python that has the package ftuneai")
    parser.add_argument("--deepspeed", default="", help="a Python that has deepspeed")
    options = parser.parse_args()
    return show(options.tables, options.ftuneai, options.deepspeed)


if __name__ == "__main__":
    sys.exit(main())
