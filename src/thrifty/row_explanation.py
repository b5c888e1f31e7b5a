"""Why a row is in the selection or out of it, from what the selection left."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from thrifty.core import sums
from thrifty.core.plan import Plan
from thrifty.core.quantities import show
from thrifty.core.resolve import method_class, summary
from thrifty.data.shard import Shard
from thrifty.data.store import Store, open_store
from thrifty.run_folder import RunFolder
from thrifty.selected import MANIFEST, OUTCOMES, check_selected

_SHOWN_CHARACTERS = 200


def explain_row(run: RunFolder, row: str) -> str:
    """Lines about ``row``: its id in the pool, or FILE:NUMBER as in the pool's files.

    Raises ValueError where there is no such row, or no selection yet.
    """
    plan, pool = run.plan(), open_store(run.pool)
    folder = run.selected("budget")
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{run.path} has no selection yet\nhint: `thrifty select {run.path}` makes it"
        )
    check_selected(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found = _find(pool, row)
    at = found.ids[0]
    outcomes = pq.read_table(folder / OUTCOMES)
    index = int(np.searchsorted(outcomes.column("id").to_numpy(), at))
    place, dropped = outcomes.column("place")[index].as_py(), outcomes.column("dropped")[index]
    origin = found.rows[0]
    lines = [
        f"row {at}: {origin.file}, record {origin.number}, {found.num_tokens[0]} tokens",
        f"  {show(origin.text[:_SHOWN_CHARACTERS])}",
    ]
    scores = _scores(run, manifest["scores"], pool)
    names = list(plan.targets) if scores.shape[1] == len(plan.targets) else ["all"]
    picked = outcomes.column("place").to_numpy() > 0
    for name, column in zip(names, scores.T, strict=True):
        lines.append(f"  {_standing(manifest['scorer'], name, column, index, picked)}")
    if place:
        lines.append(
            f"in: number {place:,} of {manifest['num_selected']:,} picked by {manifest['picker']}"
        )
    elif dropped.as_py():
        lines.append(f"out: {dropped.as_py()}, dropped by a filter before the picking")
    elif np.isnan(scores[index]).all():
        lines.append("out: it was given no score, and only rows with one are picked")
    else:
        lines.append(f"out: {_passed_over(plan, manifest)}")
    return "\n".join(lines)


def _find(pool: Store, row: str) -> Shard:
    file, _, number = row.rpartition(":")
    if not file and number.isdecimal():
        return pool.take([int(number)])
    for shard in pool.shards() if file and number.isdecimal() else ():
        for each in shard.rows:
            same = each.file == file or each.file.endswith(f"/{file}")
            if same and each.number == int(number):
                return pool.take([each.id])
    raise ValueError(
        f"the pool has no valid row {row!r}\n"
        "hint: --explain takes a row's id (selected.jsonl has them) or FILE:NUMBER; rows that were "
        f"set aside are in {pool.directory / 'quarantine.jsonl'}"
    )


def _scores(run: RunFolder, name: str, pool: Store) -> np.ndarray:
    """[num_examples, num_targets]"""
    folder = run.scores("budget") / name
    files = [folder / f"shard-{i:05d}.parquet" for i in range(pool.num_shards)]
    for file in files:
        sums.check(file, "put it back, or plan anew")
    tables = [pq.read_table(file).drop_columns("id") for file in files]
    return np.concatenate(
        [np.stack([c.to_numpy() for c in table.columns], axis=1) for table in tables]
    )


def _standing(scorer: str, name: str, column: np.ndarray, index: int, picked: np.ndarray) -> str:
    score = float(column[index])
    if math.isnan(score):
        return f"{scorer}, {name}: not scored"
    finite = column[~np.isnan(column)]
    above = float((finite > score).mean())
    lowest = column[picked][~np.isnan(column[picked])]
    least = f"; the lowest picked has {lowest.min():.4g}" if len(lowest) else ""
    return f"{scorer}, {name}: {score:.4g}, {100 * above:.1f}% of the rows score higher{least}"


def _passed_over(plan: Plan, manifest: dict[str, Any]) -> str:
    limit, picker = plan.selection.max_tokens, manifest["picker"]
    of_limit = "" if limit is None else f" of {limit:,.0f}"
    told = summary(method_class("picker", picker)).rstrip(".")
    filled = f"{manifest['num_tokens']:,}{of_limit} tokens"
    return f"{picker} ({told[0].lower()}{told[1:]}) filled {filled} with other rows"
