"""Published peaks of memory against what is predicted for them, by thrifty and by its peers.

    python bench/published_memory.py [--tables FILE.csv ...] [--ftuneai PYTHON] [--deepspeed PYTHON]

The tables are not part of the project; two rows of PEFT's comparison (``published_peft.csv``)
stand beside them. Rows that do not state their setting are listed first, with
the first rule that they break (``published_rows.py``); rows of other implementations stand in a
table of their own, since they keep other tensors than Hugging Face's do. A row whose setting
thrifty has no word for is shown with what is missing, and counts for its peers.

Each number is compared with its own quantity: `allocated`, what tensors hold, and `active`, which
adds the padding of blocks, with thrifty's account; `reserved` with what `costs/allocator.py` makes
of it, its share calibrated on the other reserved rows of that table, never on the row itself;
`device` with the CUDA context as well. The 90% interval is looked at the same way, and apart for
other implementations, which it is not made for.
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
from thrifty.costs.allocator import INTERVAL, RESERVED_SHARE, share_interval
from thrifty.costs.memory import RUNTIME_BYTES, account

TABLES = Path(__file__).parents[2] / "shared" / "research" / "memory_tables.csv"
OWN = Path(__file__).with_name("published_peft.csv")

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
    share = statistics.median(others) if others else RESERVED_SHARE["cuda"]
    return allocated * (1.0 + share) + RUNTIME_BYTES["cuda"] * (row.quantity == "device")


def calibration(rows: Sequence[Row], shares: dict[int, float]) -> str:
    """What the reserved rows say about the allocator."""
    told = f"costs/allocator.py takes {RESERVED_SHARE['cuda']:.1%}"
    if not shares:
        return f"no row gives reserved bytes; {told}"
    listed = ", ".join(f"{row.title} {shares[row.line]:+.2%}" for row in rows if row.line in shares)
    return (
        f"Reserved over allocated, {len(shares)} rows: {listed};\n"
        f"median {statistics.median(shares.values()):+.2%}; {told}"
    )


def coverage(reserved: Sequence[Row], others: Sequence[Row]) -> str:
    """How many rows lie in the interval that should hold nine of ten: reserved ones of Hugging
    Face's code each in that of the rest, other implementations in the one that is in use."""
    low, high = INTERVAL["cuda"]
    told = [
        f"The 90% interval of what is held over the predicted allocated bytes: {low:+.1%} to "
        f"{high:+.1%}"
    ]
    shares = reserved_shares(reserved)
    if len(shares) > 2:
        inside = []
        for line, share in shares.items():
            ends = share_interval([other for at, other in shares.items() if at != line])
            inside.append(ends[0] <= share <= ends[1])
        told.append(
            f"Hugging Face's code, {len(shares)} reserved rows: {sum(inside)} in the interval of "
            f"the other {len(shares) - 1}, "
            f"{sum(low <= share <= high for share in shares.values())} in that of all"
        )
    over = []
    for row in others:
        with contextlib.suppress(NotYet):
            assert row.bytes
            over.append(row.bytes / allocated_bytes(row) - 1.0)
    if over:
        told.append(
            f"other implementations, which it is not made for, {len(over)} rows: "
            f"{sum(low <= share <= high for share in over)} in it; they lie "
            f"{min(over):+.1%} to {max(over):+.1%} over"
        )
    return "\n".join(told)


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


def open_lengths(rows: Iterable[Row], estimators: dict[str, Estimator]) -> tuple[str, Errors]:
    """Rows that leave their length open and nothing else, at a short and a long one: a table, and
    each estimator's errors at the length that suits it better."""
    names = ("thrifty", *estimators)
    errors: Errors = {name: {} for name in names}
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
        jobs = [job_of(end) for end in ends]
        cells = []
        for name in names:
            if name == "thrifty":
                answers: list[float | None] = [low, high]
            else:
                answers = [job and estimators[name](job) for job in jobs]
            off = [answer / row.bytes - 1 for answer in answers if answer is not None]
            if off:
                errors[name][row.line] = min(off, key=abs)
            cells.append(" / ".join(dict.fromkeys(f"{each:+.1%}" for each in off)) or "-")
        title = f"{row['model']} {row['method']}, {row['optimizer']}"
        measured = f"{row.bytes / 2**30:.2f}"
        lines.append((title, row.implementation, row.quantity, measured, *cells))
    if not lines:
        return "none", errors
    headers = ("row", "ran", "quantity", "measured", *names)
    return display.table(headers, lines, right="lll" + "r" * (1 + len(names))), errors


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
    for path in (*tables, OWN):
        known = {_subject(each) for each in cells}
        with path.open(encoding="utf-8", newline="") as lines:
            found = list(csv.DictReader(lines))
        cells += found if path != OWN else [row for row in found if _subject(row) not in known]
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
    theirs = [row for row in kept if row.implementation == "hf"]
    others = [row for row in kept if row.implementation != "hf"]
    for title, here in (
        ("Hugging Face implementations", theirs),
        ("Other implementations", others),
    ):
        print(f"\n{title}: {len(here)} rows")
        errors = compared(here, estimators)
        print(f"\n{summary(errors, uninstalled)}")
        both = {name: both.get(name, {}) | found for name, found in errors.items()}
    print(f"\nBoth tables\n{summary(both, uninstalled)}")
    print(f"\n{coverage(theirs, others)}")
    table, errors = open_lengths(rows, estimators)
    lengths = " / ".join(map(str, LENGTHS))
    print(f"\nRows that leave their length open alone, errors at {lengths} tokens\n{table}")
    print(f"\n{summary(errors, uninstalled)}")
    return 0


def _subject(cells: dict[str, str]) -> tuple[str, str]:
    """What a row is about, whatever the version of its table."""
    return cells["source"].split("@")[0], cells["method"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", type=Path, nargs="+", default=[TABLES])
    parser.add_argument("--ftuneai", default="", help="a Python that has the package ftuneai")
    parser.add_argument("--deepspeed", default="", help="a Python that has deepspeed")
    options = parser.parse_args()
    return show(options.tables, options.ftuneai, options.deepspeed)


if __name__ == "__main__":
    sys.exit(main())
