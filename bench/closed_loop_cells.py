"""The cells of ``closed_loop.py``: which rows are in a pool, which are held back, and what binds.

A cell's rows are made from real data under a seed: rows that serve a target and are sound, rows
that look like them and are damaged, and others. Of the sound on-target rows four parts are held
back, for the target's signal, for stopping (dev), for the pilot and for the test; no row of the
pool, and none of another part, shares with a held one

    a run of 13 words             where both have 13 words or more
    a run of 8 words              where the shorter of the two has 8 to 12
    all of its words              where it has fewer

in lower case, without punctuation. ``check`` raises where that does not hold. A run is given files
of prompts and responses alone: what a row is of, and whether it is sound, stays in this process.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PARTS = ("signal", "dev", "pilot", "test")
LONG, SHORT = 13, 8
"""Words of a run that two rows must not share."""


class Row(NamedTuple):
    prompt: str
    response: str
    domain: str
    sound: bool


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A pool, its targets and its limits."""

    name: str
    about: str
    family: Callable[[Path, np.random.Generator], list[Row]]
    targets: tuple[str, ...]
    pool_rows: int
    held_rows: int = 256
    """Of each part and target."""
    scarce: int | None = None
    """So many sound on-target rows of each target, and as many damaged ones, are in the pool; None:
    as many as there are."""
    drifts: bool = False
    """Sound on-target rows are trained on more than four times: what is claimed of drift is claimed
    here, if re-scoring half-way correlates with the first scores by less than 0.7."""
    base: str = "small"
    memory_share: float | None = None
    """Of what AdamW on all weights holds above an idle process at its peak, that a run may hold;
    None: as much as it likes."""
    budgets: tuple[int, ...] = (1, 3, 10)


@dataclass(frozen=True)
class Rows:
    """A cell's, drawn."""

    pool: list[Row]
    held: Mapping[str, Mapping[str, list[Row]]]
    """target -> part -> rows"""
    targets: tuple[str, ...] = field(default=())

    @property
    def on_target(self) -> np.ndarray:
        """[pool rows], of a target and sound."""
        return np.array([row.sound and row.domain in self.targets for row in self.pool])


# -- where rows are from --------------------------------------------------------------------------


def mixed(data: Path, random: np.random.Generator) -> list[Row]:
    """Nine domains, of whose rows a fifth to a third are damaged."""
    columns = ["prompt", "response", "domain"]
    table = pq.read_table(data / "mix" / "pool.parquet", columns=[*columns, "corrupt"])
    rows = [
        Row(p, r, d, not c)
        for p, r, d, c in zip(*(table[n].to_pylist() for n in [*columns, "corrupt"]), strict=True)
    ]
    held = pq.read_table(data / "mix" / "targets.parquet", columns=columns)
    return rows + [
        Row(*row, sound=True) for row in zip(*(held[n].to_pylist() for n in columns), strict=True)
    ]


def school_sums(data: Path, random: np.random.Generator) -> list[Row]:
    """One source, one style: half of the answers belong to other questions."""
    found = []
    for part in ("train", "test"):
        table = pq.read_table(data / "gsm8k" / f"{part}.parquet")
        found += zip(table["question"].to_pylist(), table["answer"].to_pylist(), strict=True)
    swapped = np.sort(random.permutation(len(found))[: len(found) // 2])
    other = dict(zip(swapped.tolist(), np.roll(swapped, 1).tolist(), strict=True))
    return [
        Row(question, found[other.get(place, place)][1], _skill(question), place not in other)
        for place, (question, _) in enumerate(found)
    ]


def all_sums(data: Path, random: np.random.Generator) -> list[Row]:
    """The same, whatever they are about."""
    return [row._replace(domain="sums") for row in school_sums(data, random)]


def _skill(question: str) -> str:
    return "money" if re.search(r"\$|dollar|cost|price", question) else "other sums"


def two_styles(data: Path, random: np.random.Generator) -> list[Row]:
    """Word problems answered step by step, and word problems answered by a bare number: what serves
    the one spoils the other. Among the rows of the mixed pool."""
    table = pq.read_table(data / "mathword-small" / "data.parquet")
    bare = zip(table["question"].to_pylist(), table["answer"].to_pylist(), strict=True)
    worked = [
        row._replace(domain="worked" if row.domain == "math" else "other")
        for row in mixed(data, random)
    ]
    return worked + [Row(question, answer, "bare", True) for question, answer in bare]


CELLS = (
    Cell(
        name="math",
        about="mixed pool, school sums; sound on-target rows abound",
        family=mixed,
        targets=("math",),
        pool_rows=12_000,
    ),
    Cell(
        name="general",
        about="mixed pool, general questions; sound on-target rows abound",
        family=mixed,
        targets=("general",),
        pool_rows=12_000,
    ),
    Cell(
        name="correct",
        about="one family: half of the answers are swapped, the target is what is right",
        family=all_sums,
        targets=("sums",),
        pool_rows=7_000,
    ),
    Cell(
        name="skill",
        about="one family: half of the answers are swapped, the target is a sub-skill",
        family=school_sums,
        targets=("money",),
        pool_rows=6_500,
    ),
    Cell(
        name="conflict",
        about="two targets at odds: answers step by step, and bare numbers",
        family=two_styles,
        targets=("worked", "bare"),
        pool_rows=12_000,
        held_rows=128,
    ),
    Cell(
        name="scarce math",
        about="mixed pool with 60 sound rows of school sums",
        family=mixed,
        targets=("math",),
        pool_rows=12_000,
        scarce=60,
        drifts=True,
    ),
    Cell(
        name="scarce general",
        about="mixed pool with 60 sound general rows",
        family=mixed,
        targets=("general",),
        pool_rows=12_000,
        scarce=60,
        drifts=True,
    ),
    Cell(
        name="scarce pair",
        about="mixed pool with 40 sound rows each of sql and medicine",
        family=mixed,
        targets=("sql", "medical"),
        pool_rows=12_000,
        held_rows=128,
        scarce=40,
        drifts=True,
    ),
    Cell(
        name="memory",
        about="math, half of AdamW's peak, FLOPs abound",
        family=mixed,
        targets=("math",),
        pool_rows=4_000,
        base="large",
        memory_share=0.5,
        budgets=(3,),
    ),
    Cell(
        name="both",
        about="math, half of AdamW's peak, and few FLOPs",
        family=mixed,
        targets=("math",),
        pool_rows=8_000,
        base="large",
        memory_share=0.5,
        budgets=(1, 3),
    ),
)

NOT_BUILT = {
    "switch": "the target mix switches mid-run: a plan's targets are fixed for the run",
    "both, with decoding": "objective.serving shares FLOPs with answers, and models of this size "
    "give none that is right: every vote would be worth nothing",
}
"""Cells that the protocol asks for and that are not run, and why."""


# -- drawing them ---------------------------------------------------------------------------------


def draw(cell: Cell, data: Path) -> Rows:
    """The cell's rows, under its name as the seed: the same for every arm, budget and seed."""
    random = np.random.default_rng(list(cell.name.encode()))
    rows = cell.family(data, random)
    rows = [rows[place] for place in random.permutation(len(rows))]
    seen = Seen()
    held: dict[str, dict[str, list[Row]]] = {t: {p: [] for p in PARTS} for t in cell.targets}
    left = []
    for row in rows:
        parts = held.get(row.domain, {}) if row.sound else {}
        part = min(PARTS, key=lambda p: len(parts[p])) if parts else ""
        if part and len(parts[part]) < cell.held_rows:
            if row not in seen:
                parts[part].append(row)
                seen.add(row)
        else:
            left.append(row)
    left = [left[place] for place in random.permutation(len(left))]  # held rows came first
    found = Rows(list(_pool(cell, left, seen)), held, cell.targets)
    check(found)
    return found


def _pool(cell: Cell, rows: Iterable[Row], held: Seen) -> Iterator[Row]:
    """Rows in their order that are not among the held ones, as many as the cell has."""
    taken: dict[tuple[str, bool], int] = {}
    total = 0
    for row in rows:
        kind = (row.domain, row.sound)
        scarce = cell.scarce is not None and row.domain in cell.targets
        if scarce and taken.get(kind, 0) >= (cell.scarce or 0):
            continue
        if total < cell.pool_rows and row not in held:
            taken[kind] = taken.get(kind, 0) + 1
            total += 1
            yield row


class Seen:
    """Rows, and whether another shares with one of them what it must not."""

    def __init__(self) -> None:
        self._long: set[str] = set()
        self._short: set[str] = set()
        """Of rows with fewer than ``LONG`` words."""
        self._any_short: set[str] = set()
        self._whole: set[str] = set()

    def add(self, row: Row) -> None:
        words = _words(row)
        self._whole.add(" ".join(words))
        self._long.update(_runs(words, LONG))
        self._any_short.update(_runs(words, SHORT))
        if len(words) < LONG:
            self._short.update(_runs(words, SHORT))

    def __contains__(self, row: Row) -> bool:
        words = _words(row)
        if " ".join(words) in self._whole:
            return True
        short = self._any_short if len(words) < LONG else self._short
        return any(run in self._long for run in _runs(words, LONG)) or any(
            run in short for run in _runs(words, SHORT)
        )


def _words(row: Row) -> list[str]:
    return re.findall(r"\w+", f"{row.prompt} {row.response}".lower())


def _runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))


def check(rows: Rows) -> None:
    """Raises ValueError where two parts, or a part and the pool, share what they must not, or where
    a part is empty."""
    all_held = Seen()
    for target, parts in rows.held.items():
        for part, some in parts.items():
            if not some:
                raise ValueError(
                    f"there are no {part} rows of {target}\nhint: fewer held_rows of each part"
                )
            _refuse_shared(some, all_held, f"the {part} rows of {target} and another part")
            for row in some:
                all_held.add(row)
    _refuse_shared(rows.pool, all_held, "the pool and a held part")


def _refuse_shared(rows: Sequence[Row], others: Seen, what: str) -> None:
    if shared := sum(row in others for row in rows):
        raise ValueError(
            f"{what} share words: {shared} rows\nhint: draw the cell anew; held rows come first"
        )


def write(rows: Rows, folder: Path) -> None:
    """pool.parquet, clean.parquet (the sound on-target rows of the pool) and TARGET-PART.parquet,
    of prompts and responses alone."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = [row for row, wanted in zip(rows.pool, rows.on_target, strict=True) if wanted]
    files = {"pool": rows.pool, "clean": clean}
    files |= {f"{t}-{part}": some for t, parts in rows.held.items() for part, some in parts.items()}
    for name, some in files.items():
        columns = {"prompt": [r.prompt for r in some], "response": [r.response for r in some]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


# -- what models are pretrained on ----------------------------------------------------------------


def passages(data: Path, most: int, length: int = 1500) -> list[str]:
    """Running text of many kinds, cut and shuffled."""
    texts = []
    for folder in ("gutenberg-en", "shakespeare", "tinystories", "wikitext2"):
        for file in sorted((data / f"text-{folder}").glob("*.txt.gz")):
            texts.append(gzip.decompress(file.read_bytes()).decode("utf-8", "replace"))
    for folder in ("inaugural", "python", "state-union"):
        texts += pq.read_table(data / f"text-{folder}" / "data.parquet")["text"].to_pylist()
    cut = [text[at : at + length] for text in texts for at in range(0, len(text), length)]
    order = np.random.default_rng(0).permutation(len(cut))[:most]
    return [cut[place] for place in order]
