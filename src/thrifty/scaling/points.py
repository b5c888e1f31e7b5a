"""Runs to fit a law to, from a CSV: a line a run, with N, D and loss in columns.

Columns are known by the names that people give them, in any case, with spaces, dashes or
underscores. FLOPs stand in for N or D where one of them is missing: C = 6 N D. Lines that say the
same run twice count once.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thrifty.core.quantities import parse_flops, parse_parameters, parse_tokens, show
from thrifty.core.typed import nearest

NAMES = {
    "N": "n params parameters num_params num_parameters model_size size",
    "D": "d tokens num_tokens training_tokens train_tokens",
    "C": "c flops flop training_flop training_flops num_flops compute",
    "loss": "loss val_loss l valid_loss validation_loss eval_loss dev_loss test_loss final_loss",
    "unique": "unique unique_tokens u num_unique_tokens",
}
"""Field -> the column names that it goes by."""
PARSERS = {"N": parse_parameters, "D": parse_tokens, "C": parse_flops, "unique": parse_tokens}
FLOPS_PER_TOKEN = 6.0
"""Of training, a parameter: forward and backward without attention (arXiv:2001.08361)."""
MAX_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class Points:
    """Runs, column by column, each [n]."""

    N: NDArray[np.float64]
    D: NDArray[np.float64]
    loss: NDArray[np.float64]
    unique: NDArray[np.float64]
    """Infinite where nothing is said of it."""
    lines: NDArray[np.int64]
    """In the file, from 1."""

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Points:
        return Points(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @property
    def log_loss(self) -> NDArray[np.float64]:
        return np.log(self.loss)

    @property
    def repeated(self) -> NDArray[np.bool_]:
        """Which runs saw tokens more than once."""
        found: NDArray[np.bool_] = self.D / self.unique > 1 + 1e-6
        return found


@dataclass(frozen=True)
class Read:
    points: Points
    notes: tuple[str, ...]
    """What was assumed or left out."""


def read_points(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    needs: Sequence[str] = ("N", "D"),
    flops_per_token: float = FLOPS_PER_TOKEN,
) -> Read:
    """The runs of a CSV. ``columns`` names the column of a field that goes by another name.

    Raises ValueError for a file that is none, columns that are missing or meant twice, and for
    values that no run can have, with their lines.
    """
    header, rows = _rows(Path(path))
    found = _columns(header, columns or {}, path)
    needs = [*needs, "loss"]
    missing = [name for name in needs if name not in found]
    derived = missing[0] if len(missing) == 1 and missing[0] in ("N", "D") else ""
    stand_in = "D" if derived == "N" else "N"
    if derived and not {"C", stand_in} <= found.keys():
        derived = ""
    if missing and not derived:
        raise ValueError(
            f"{path} has no column for {' and '.join(missing)}: it has {_some(header, missing)}\n"
            f"hint: call it {' or '.join(NAMES[missing[0]].split()[:2])}, "
            f"or name it: --column {missing[0]}=NAME"
            f"{'; --form tokens fits D alone' * (missing == ['N'])}"
        )
    problems: list[str] = []
    values = {
        name: [_value(name, row, place, line, problems) for line, row in rows]
        for name, place in found.items()
        if name in needs or name == "unique" or derived
    }
    if problems:
        more = f"; and {len(problems) - MAX_TOLD} more" if len(problems) > MAX_TOLD else ""
        raise ValueError(
            f"{path}: {'; '.join(problems[:MAX_TOLD])}{more}\n"
            "hint: leave out runs that diverged or were not evaluated"
        )
    notes = []
    arrays = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
    if derived:
        arrays[derived] = arrays["C"] / (flops_per_token * arrays[stand_in])
        notes.append(f"{derived} is FLOPs / ({flops_per_token:g} {stand_in}): no column has it")
    nothing = np.full(len(rows), np.inf)
    points = Points(
        N=arrays.get("N", nothing),
        D=arrays.get("D", nothing),
        loss=arrays["loss"],
        unique=arrays.get("unique", nothing),
        lines=np.array([line for line, _ in rows], dtype=np.int64),
    )
    once = _first_of_each(points)
    if len(once) < len(points):
        notes.append(f"{len(points) - len(once)} lines say the same run again and count once")
    return Read(points.take(once), tuple(notes))


def _some(header: Sequence[str], missing: Sequence[str]) -> str:
    """Those that might be meant, or the first."""
    words = [word for field in missing for word in NAMES[field].split() if len(word) > 3]
    close = [name for name in header if any(word in name.lower() for word in words)] or header
    shown = ", ".join(show(name) for name in close[:MAX_TOLD])
    return f"{shown} and others" if len(header) > MAX_TOLD else shown or "none"


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the lines that are not empty, with their numbers."""
    if not path.is_file():
        raise ValueError(f"{path} is no file\nhint: a CSV with a line a run and columns N, D, loss")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text\nhint: save it as CSV, UTF-8") from None
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(), delimiter="\t" if "\t" in first else ",")
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}\nhint: a plain CSV") from None
    if len(lines) < 2:
        said = "only a header" if lines else "empty"
        raise ValueError(f"{path} is {said}\nhint: a line a run, below a header like N,D,loss")
    return lines[0][1], lines[1:]


def _columns(header: Sequence[str], named: Mapping[str, str], path: str | Path) -> dict[str, int]:
    """Field -> the place of its column."""
    found: dict[str, int] = {}
    for field, name in named.items():
        if field not in NAMES:
            raise ValueError(f"--column {field}=...: no such field\nhint: {nearest(field, NAMES)}")
        if name not in header:
            raise ValueError(f"{path} has no column {show(name)}\nhint: {nearest(name, header)}")
        found[field] = header.index(name)
    plain = [name.lower().replace(" ", "_").replace("-", "_") for name in header]
    for field, names in NAMES.items():
        if field in found:
            continue
        places = [i for i, name in enumerate(plain) if name in names.split()]
        if len(places) > 1:
            raise ValueError(
                f"{path}: {' and '.join(header[i] for i in places)} could both be {field}\n"
                f"hint: --column {field}={header[places[0]]} says which"
            )
        if places:
            found[field] = places[0]
    return found


def _value(field: str, row: Sequence[str], place: int, line: int, problems: list[str]) -> float:
    text = row[place] if place < len(row) else ""
    try:
        value = float(text)
    except ValueError:
        try:
            value = PARSERS[field](text)
        except (KeyError, ValueError):
            problems.append(f"line {line}: {field} is {show(text) if text else 'missing'}")
            return math.nan
    least = 0.0 if field == "D" else math.ulp(0.0)  # of fine-tuning none is a start
    if not least <= value < math.inf:
        problems.append(f"line {line}: {field} is {text}, which no run has")
    return value


def _first_of_each(points: Points) -> NDArray[np.int64]:
    rows = np.stack([points.N, points.D, points.loss, points.unique], axis=1)
    _, places = np.unique(rows, axis=0, return_index=True)
    return np.sort(places)
