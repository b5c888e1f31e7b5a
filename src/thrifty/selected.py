"""What a selection leaves: files that anybody's trainer reads, and why each row is in or out.

selected/data/  selected/selected.jsonl  the rows in order: a ``datasets`` folder and a jsonl
selected/outcomes.parquet                of every row of the pool: its place, or why it is out
selected/histogram.json  examples.json   for the report
selected/manifest.json                   the selection is done
selected/SHA256SUMS                      of all of them

Rows lie in the pool in another order than they were picked in, so they are put into blocks of
places first, on the disk, and a block at a time is sorted: as many rows as are picked, a block of
them is in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from thrifty.core import sums
from thrifty.core.contracts import Candidates, Picked
from thrifty.core.durable import make_folder, replace_folder, write_atomically
from thrifty.data.remote import shown, tried
from thrifty.data.store import Store

MANIFEST = "manifest.json"
OUTCOMES = "outcomes.parquet"
_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 2000
_BINS = 40
_BLOCK_ROWS = 16384


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
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    make_folder(folder.parent)
    draft.mkdir()
    at = np.searchsorted(candidates.ids, picked.ids)
    scores = candidates.scores[at]
    _write_rows(draft, _rows(pool, picked, scores, candidates.targets))
    _write_dataset(draft / "data", draft / "selected.jsonl")
    np.save(draft / "ids.npy", picked.ids)
    _write_json(draft / "histogram.json", _histogram(candidates, scores))
    _write_json(draft / "examples.json", _examples(pool, candidates, picked, dropped))
    pq.write_table(_outcomes(candidates, picked, dropped), draft / OUTCOMES)
    manifest = {
        **made_under,
        "num_candidates": len(pool),
        "num_selected": len(picked.ids),
        "num_tokens": int(candidates.num_tokens[at].sum()),
        "dropped": dict(Counter(_reason_class(reason) for reason in dropped.values())),
    }
    _write_json(draft / MANIFEST, manifest)
    sums.note_all(draft)
    replace_folder(draft, folder)


def check_selected(folder: Path) -> None:
    """Raise ValueError where a file of a finished selection is not as it was written."""
    sums.check_all(folder, f"delete {folder}; the same command selects again")


# -- the rows -----------------------------------------------------------------------------------


def _rows(
    pool: Store, picked: Picked, scores: NDArray[np.float32], targets: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, row) of the picked rows in the pool's order: TRL's fields, with id, origin, weight,
    scores and what other columns they had."""
    order = np.argsort(picked.ids, kind="stable")
    for start in range(0, len(order), _BLOCK_ROWS):
        places = order[start : start + _BLOCK_ROWS]
        rows = pool.take(picked.ids[places]).rows
        for i, row in zip(places.tolist(), rows, strict=True):
            yield (
                i,
                {
                    **row.extra,
                    **row.content,
                    "id": row.id,
                    "file": row.file,
                    "number": row.number,
                    "weight": float(picked.weights[i]),
                    **{f"score_{name}": float(scores[i, t]) for t, name in enumerate(targets)},
                },
            )


def _write_rows(folder: Path, rows: Iterator[tuple[int, dict[str, Any]]]) -> None:
    """Leave ``selected.jsonl``, by place."""
    blocks = folder / "blocks"
    blocks.mkdir()
    while some := list(islice(rows, _BLOCK_ROWS)):
        lines: dict[int, list[str]] = {}
        for place, row in some:
            line = f"{place}\t{json.dumps(row, ensure_ascii=False)}\n"
            lines.setdefault(place // _BLOCK_ROWS, []).append(line)
        for block, found in lines.items():
            with (blocks / str(block)).open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(found)
    with (folder / "selected.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for path in sorted(blocks.iterdir(), key=lambda path: int(path.name)):
            with path.open(encoding="utf-8", newline="\n") as unsorted:
                placed = [line.partition("\t") for line in unsorted]
            placed.sort(key=lambda parts: int(parts[0]))
            file.writelines(line for _, _, line in placed)
    shutil.rmtree(blocks)


def _write_dataset(folder: Path, rows: Path) -> None:
    """The rows of a jsonl as ``save_to_disk`` leaves them, a file for each block.

    Every column that a row has is one, of a type that all blocks fit.
    """
    from datasets import Dataset, Features

    schemas = [Dataset.from_list(_filled(block)).features.arrow_schema for block in _blocks(rows)]
    columns = Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
    files, fingerprints = [], []
    for number, block in enumerate(_blocks(rows)):
        part = folder.with_name("part")
        Dataset.from_list(_filled(block, columns), features=columns).save_to_disk(str(part))
        state = json.loads((part / "state.json").read_text(encoding="utf-8"))
        fingerprints.append(state["_fingerprint"])
        if not folder.exists():
            folder.mkdir()
            (part / "dataset_info.json").rename(folder / "dataset_info.json")
        for found in state["_data_files"]:
            name = f"data-{number:05d}-of-{len(schemas):05d}.arrow"
            (part / found["filename"]).rename(folder / name)
            files.append({"filename": name})
        shutil.rmtree(part)
    state["_data_files"] = files
    # ``map`` finds its results by it.
    state["_fingerprint"] = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
    _write_json(folder / "state.json", state)


def _filled(block: list[dict[str, Any]], columns: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows with all of the columns, or with those of any of them: ``from_list`` asks the first
    row alone."""
    names = list(columns or dict.fromkeys(name for row in block for name in row))
    return [{name: row.get(name) for name in names} for row in block]


def _blocks(rows: Path) -> Iterator[list[dict[str, Any]]]:
    with rows.open(encoding="utf-8", newline="\n") as lines:
        while some := list(islice(lines, _BLOCK_ROWS)):
            yield [json.loads(line) for line in some]


# -- about them ---------------------------------------------------------------------------------


def copy_selected(folder: Path, url: str) -> bool:
    """Copy a finished selection to a folder at any fsspec URL, its manifest last; False where it
    lies there already. Raises ValueError where there is none, or where the URL fails."""
    import fsspec

    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds no finished selection\nhint: `thrifty select` makes it")
    try:
        there, root = fsspec.core.url_to_fs(url.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"cannot write to {shown(url)!r}: {error}\n"
            "hint: install the fsspec package of that protocol (s3fs for s3://)"
        ) from None
    mark = (folder / MANIFEST).read_bytes()

    def lies_there() -> bool:
        path = f"{root}/{MANIFEST}"
        return there.exists(path) and there.cat_file(path) == mark

    if tried("read", url, lies_there):
        return False
    tried(
        "write", url, lambda: there.exists(f"{root}/{MANIFEST}") and there.rm(f"{root}/{MANIFEST}")
    )
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files.sort(key=lambda path: path == folder / MANIFEST)
    for path in files:
        name = path.relative_to(folder).as_posix()
        tried("write", f"{url.rstrip('/')}/{name}", partial(_put, there, path, f"{root}/{name}"))
    return True


def _put(there: Any, path: Path, name: str) -> None:
    there.makedirs(name.rpartition("/")[0], exist_ok=True)
    there.put_file(str(path), name)


def _outcomes(candidates: Candidates, picked: Picked, dropped: Mapping[int, str]) -> pa.Table:
    """Of every row: its place among the picked from 1 on, 0 where it is not, and the reason it was
    dropped for."""
    place = np.zeros(len(candidates), dtype=np.int64)
    place[np.searchsorted(candidates.ids, picked.ids)] = np.arange(1, len(picked.ids) + 1)
    reasons = pa.array(["", *dropped.values()]).dictionary_encode()
    reason = np.zeros(len(candidates), dtype=np.int32)
    reason[np.searchsorted(candidates.ids, _ids(dropped))] = reasons.indices.to_numpy()[1:]
    return pa.table(
        {
            "id": candidates.ids,
            "place": place,
            "dropped": pa.DictionaryArray.from_arrays(reason, reasons.dictionary),
        }
    )


def _ids(dropped: Mapping[int, str]) -> NDArray[np.int64]:
    return np.fromiter(dropped, dtype=np.int64, count=len(dropped))


def _reason_class(reason: str) -> str:
    """``duplicate of row 17`` counts as ``duplicate``."""
    return reason.partition(" of row ")[0]


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False))


def _histogram(candidates: Candidates, chosen: NDArray[np.float32]) -> dict[str, Any]:
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
    left = np.ones(len(candidates), dtype=bool)
    left[np.searchsorted(candidates.ids, np.concatenate([picked.ids, _ids(dropped)]))] = False
    out = np.flatnonzero(left)
    order = np.argsort(-np.nan_to_num(candidates.scores[out, 0], nan=-np.inf), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, _SHOWN_ROWS).astype(int)] if len(order) else []
    rejected = {row: dropped[row] for row in islice(dropped, _SHOWN_ROWS // 4)}
    for i in spread:
        if len(rejected) < _SHOWN_ROWS:
            rejected[int(candidates.ids[out[i]])] = "outside the token budget"

    def shown(rows: list[int]) -> Iterator[dict[str, Any]]:
        ids = np.asarray(rows, dtype=np.int64)
        taken, scores = pool.take(ids), candidates.scores[np.searchsorted(candidates.ids, ids), 0]
        for row, tokens, score in zip(
            taken.rows, taken.num_tokens.tolist(), scores.tolist(), strict=True
        ):
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
