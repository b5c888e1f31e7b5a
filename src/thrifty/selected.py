"""What a selection leaves: files that anybody's trainer reads, and why each row is in or out.

selected/data/  selected/selected.jsonl  the rows in order: a ``datasets`` folder and a jsonl
selected/outcomes.parquet                of every row of the pool: its place, or why it is out
selected/histogram.json  examples.json   for the report
selected/manifest.json                   written last: the selection is done
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from thrifty.core.contracts import Candidates, Picked
from thrifty.core.durable import rename_durably, write_atomically
from thrifty.data.store import Store

MANIFEST = "manifest.json"
OUTCOMES = "outcomes.parquet"
_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 2000
_BINS = 40


def write_selected(
    folder: Path,
    pool: Store,
    candidates: Candidates,
    picked: Picked,
    dropped: Mapping[int, str],
    made_under: Mapping[str, Any],
) -> None:
    """Replace what lies in ``folder``; ``candidates`` are all rows, the dropped ones included.

    ``made_under`` joins the manifest: the settings, and the names of the methods.
    """
    from datasets import Dataset

    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    draft.mkdir(parents=True)
    place = {row: i for i, row in enumerate(candidates.ids.tolist())}
    scores = candidates.scores[[place[row] for row in picked.ids.tolist()]]
    rows = list(_rows(pool, picked, scores, candidates.targets))
    with (draft / "selected.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    Dataset.from_list(rows).save_to_disk(str(draft / "data"))
    np.save(draft / "ids.npy", picked.ids)
    _write_json(draft / "histogram.json", _histogram(candidates, scores))
    _write_json(draft / "examples.json", _examples(pool, candidates, picked, dropped))
    pq.write_table(_outcomes(candidates, picked, dropped), draft / OUTCOMES)
    kept = np.isin(candidates.ids, picked.ids)
    manifest = {
        **made_under,
        "num_candidates": len(pool),
        "num_selected": len(picked.ids),
        "num_tokens": int(candidates.num_tokens[kept].sum()),
        "dropped": dict(Counter(_reason_class(reason) for reason in dropped.values())),
    }
    _write_json(draft / MANIFEST, manifest)
    rename_durably(draft, folder)


def _outcomes(candidates: Candidates, picked: Picked, dropped: Mapping[int, str]) -> pa.Table:
    """Of every row: its place among the picked from 1 on, 0 where it is not, and the reason it was
    dropped for."""
    place = dict(zip(picked.ids.tolist(), range(1, len(picked.ids) + 1), strict=True))
    ids = candidates.ids.tolist()
    return pa.table(
        {
            "id": ids,
            "place": pa.array([place.get(row, 0) for row in ids], pa.int64()),
            "dropped": pa.array([dropped.get(row, "") for row in ids]).dictionary_encode(),
        }
    )


def _reason_class(reason: str) -> str:
    """``duplicate of row 17`` counts as ``duplicate``."""
    return reason.partition(" of row ")[0]


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False))


def _rows(
    pool: Store, picked: Picked, scores: np.ndarray, targets: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The picked rows in order, in TRL's fields, with id, origin, weight, scores and what other
    columns they had."""
    for i, row in enumerate(pool.take(picked.ids).rows):
        yield {
            **row.extra,
            **row.content,
            "id": row.id,
            "file": row.file,
            "number": row.number,
            "weight": float(picked.weights[i]),
            **{f"score_{name}": float(scores[i, t]) for t, name in enumerate(targets)},
        }


def _histogram(candidates: Candidates, chosen: np.ndarray) -> dict[str, Any]:
    """Counts by score, of all candidates and of the chosen, a target at a time."""
    found = {}
    for t, name in enumerate(candidates.targets):
        finite = candidates.scores[np.isfinite(candidates.scores[:, t]), t]
        if not len(finite):
            continue
        everyone, edges = np.histogram(finite, bins=_BINS)
        picked = np.histogram(chosen[np.isfinite(chosen[:, t]), t], bins=edges)[0]
        found[name] = {
            "edges": edges.astype(float).tolist(),
            "all": everyone.tolist(),
            "selected": picked.tolist(),
        }
    return found


def _examples(
    pool: Store, candidates: Candidates, picked: Picked, dropped: Mapping[int, str]
) -> dict[str, Any]:
    """Twenty rows from the top of the choice, and twenty that were not chosen, with the reason:
    filtered ones first, then a spread over the scores."""
    place = {row: i for i, row in enumerate(candidates.ids.tolist())}
    gone = np.fromiter(dropped, dtype=np.int64, count=len(dropped))
    out = candidates.where(~np.isin(candidates.ids, np.concatenate([picked.ids, gone])))
    order = np.argsort(-np.nan_to_num(out.scores[:, 0], nan=-np.inf), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, _SHOWN_ROWS).astype(int)] if len(order) else []
    rejected = {row: dropped[row] for row in list(dropped)[: _SHOWN_ROWS // 4]}
    for i in spread:
        if len(rejected) < _SHOWN_ROWS:
            rejected[int(out.ids[i])] = "outside the token budget"

    def shown(rows: list[int]) -> Iterator[dict[str, Any]]:
        taken = pool.take(np.asarray(rows, dtype=np.int64))
        for row, tokens in zip(taken.rows, taken.num_tokens.tolist(), strict=True):
            score = float(candidates.scores[place[row.id], 0]) if row.id in place else math.nan
            yield {
                "id": row.id,
                "file": row.file,
                "number": row.number,
                "score": score if math.isfinite(score) else None,
                "tokens": tokens,
                "text_prompt": row.prompt[:_SHOWN_CHARACTERS],
                "text_completion": row.completion[:_SHOWN_CHARACTERS],
            }

    return {
        "selected": list(shown(picked.ids[:_SHOWN_ROWS].tolist())),
        "rejected": [{**row, "reason": rejected[row["id"]]} for row in shown(list(rejected))],
    }
