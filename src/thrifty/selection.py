"""Which rows to train on: score the pool shard by shard, filter, pick, and leave the choice as
files that anybody's trainer reads.

    scores/NAME-HASH/shard-00000.parquet     one float a row and target; a killed scoring goes on
                                             at the shard, and equal settings reuse the files
    selected/data/  selected/selected.jsonl  the rows in order: a ``datasets`` folder and a jsonl
    selected/manifest.json                   written last: the selection is done
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from thrifty.core.budget import Cost
from thrifty.core.contracts import Candidates, Held, Models, Picked, Picker, Rows, Scorer
from thrifty.core.durable import rename_durably, write_atomically
from thrifty.core.ledger import Stage
from thrifty.core.plan import Plan
from thrifty.core.resolve import name_of, parse_spec, resolve
from thrifty.data.store import Store
from thrifty.look import PoolLook
from thrifty.signals.models import local_device, locate, weights_sha256
from thrifty.signals.peak_memory import peak_noted

MANIFEST = "manifest.json"
_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 2000
_BINS = 40


@dataclass(frozen=True, kw_only=True)
class SelectionJob:
    """Everything that one selection needs, resolved."""

    plan: Plan
    pool: Store
    signals: Mapping[str, Rows]
    held: Held
    models: Models
    base_sha256: str
    predicted: Cost
    load: Cost
    """Of the base model."""
    predicted_vectors: Cost
    """Of the pool, where a filter or the picker needs them."""
    scores: Path
    selected: Path


def is_done(selected: Path, mark: str) -> bool:
    """Whether a selection under the settings of ``mark`` lies in ``selected``.

    Raises ValueError where one under other settings does.
    """
    manifest = selected / MANIFEST
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
    if found != mark:
        raise ValueError(
            f"{selected} was made under other settings than plan.yaml now has\n"
            f"hint: delete {selected} to select anew, or undo the edit"
        )
    return True


def settings_mark(plan: Plan, pool: Store) -> str:
    """A hash of all that decides a selection."""
    selection = plan.selection
    parts = [
        selection.scorer,
        list(selection.filters),
        selection.picker,
        selection.max_tokens,
        selection.seed,
        pool.manifest.fingerprint,
        {name: [t.signal, t.dev, t.test, t.weight] for name, t in plan.targets.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def select(job: SelectionJob, stage: Stage) -> None:
    """Score, filter, pick, write. Raises ValueError where nothing is left to train on."""
    plan = job.plan
    scorer: Scorer = resolve("scorer", plan.selection.scorer)
    folder = job.scores / f"{name_of(scorer)}-{_score_mark(job, scorer)}"
    _score(job, scorer, folder, stage)
    look = _look(job, stage)
    filters = [resolve("filter", spec) for spec in plan.selection.filters]
    picker: Picker = resolve("picker", plan.selection.picker)
    if any(method.needs_vectors for method in (*filters, picker)):
        look.make_vectors()
    with stage.spending("pick", Cost()):
        candidates = _candidates(job, scorer, folder, look)
        dropped: dict[int, str] = {}
        for each in filters:
            found = each.drop(candidates, job.held)
            dropped |= found
            gone = np.fromiter(found, dtype=np.int64, count=len(found))
            candidates = candidates.where(~np.isin(candidates.ids, gone))
        limit = plan.selection.max_tokens or math.inf
        picked = picker.pick(candidates, limit, plan.selection.seed)
        if not len(picked.ids):
            raise ValueError(
                f"nothing is left to train on: {len(dropped):,} rows filtered, "
                f"{len(candidates):,} candidates, {limit:,.0f} tokens to keep\n"
                "hint: raise selection.max_tokens, or look at why rows were dropped"
            )
        assert candidates.num_tokens[np.isin(candidates.ids, picked.ids)].sum() <= limit
        _write(job, candidates, picked, dropped)


# -- scoring ------------------------------------------------------------------------------------


def _score_mark(job: SelectionJob, scorer: Scorer) -> str:
    """A hash of what the scores depend on, so that equal work is never paid for twice."""
    targets = {name: list(t.signal) for name, t in job.plan.targets.items()}
    parts = [
        parse_spec("scorer", job.plan.selection.scorer),
        job.pool.manifest.fingerprint,
        _weights_mark(job, scorer) if scorer.needs_model else None,
        targets if scorer.needs_target else None,
        job.plan.training.dtype if scorer.needs_model else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()[:12]


def _weights_mark(job: SelectionJob, scorer: Scorer) -> str:
    """A hash of the weights that the scorer looks at."""
    if not scorer.model:
        return job.base_sha256
    return weights_sha256(locate(scorer.model, weights=True)[0])


def _look(job: SelectionJob, stage: Stage) -> PoolLook:
    parts = [job.pool.manifest.fingerprint, job.base_sha256, job.plan.training.dtype]
    mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    return PoolLook(
        pool=job.pool,
        models=job.models,
        load=job.load,
        predicted=job.predicted_vectors,
        stage=stage,
        folder=job.scores / f"vectors-{mark}",
    )


def _score(job: SelectionJob, scorer: Scorer, folder: Path, stage: Stage) -> None:
    files = [folder / f"shard-{i:05d}.parquet" for i in range(job.pool.num_shards)]
    todo = [i for i, file in enumerate(files) if not file.is_file()]
    if not todo:
        return
    folder.mkdir(parents=True, exist_ok=True)
    signals = job.signals if scorer.needs_target else {}
    # A scoring that does not fit is refused before its first row.
    stage.require(job.predicted * (len(todo) / len(files)), "scoring")
    if scorer.needs_model:
        with stage.spending("load", job.load):
            job.models.other(scorer.model).base()
    with stage.spending("prepare", Cost()) as lease, peak_noted(lease, local_device()):
        state = scorer.prepare(job.pool, signals, job.models, lease)
    for i in todo:
        share = job.predicted * (1 / len(files))
        with stage.spending("score", share, step=i) as lease, peak_noted(lease, local_device()):
            shard = job.pool.shard(i)
            scores = scorer.score(shard, state, lease)
            expected = (len(shard), max(len(signals), 1))
            assert scores.shape == expected, f"{name_of(scorer)}: {scores.shape}, not {expected}"
            columns = {f"score_{t}": scores[:, t] for t in range(scores.shape[1])}
            aside = files[i].with_suffix(".new")
            pq.write_table(pa.table({"id": shard.ids, **columns}), aside)
            rename_durably(aside, files[i])


def _candidates(job: SelectionJob, scorer: Scorer, folder: Path, look: PoolLook) -> Candidates:
    ids, scores, tokens, prints = [], [], [], []
    for i, shard in enumerate(job.pool.shards()):
        table = pq.read_table(folder / f"shard-{i:05d}.parquet")
        columns = [table.column(name).to_numpy() for name in table.column_names if name != "id"]
        if not np.array_equal(table.column("id").to_numpy(), shard.ids):
            raise ValueError(
                f"{folder}/shard-{i:05d}.parquet scores other rows than the pool's\n"
                f"hint: delete {folder} to score again"
            )
        ids.append(shard.ids)
        scores.append(np.stack(columns, axis=1).astype(np.float32))
        tokens.append(shard.num_tokens)
        prints.append(np.array([np.void(p) for p in shard.fingerprints], dtype="V16"))
    names = tuple(job.signals) if scorer.needs_target else ("all",)
    weights = [job.plan.targets[n].weight if n in job.plan.targets else 1.0 for n in names]
    return Candidates(
        ids=np.concatenate(ids),
        scores=np.concatenate(scores),
        num_tokens=np.concatenate(tokens).astype(np.int64),
        fingerprints=np.concatenate(prints),
        targets=names,
        weights=tuple(weights),
        look=look,
    )


# -- writing ------------------------------------------------------------------------------------


def _write(
    job: SelectionJob, candidates: Candidates, picked: Picked, dropped: Mapping[int, str]
) -> None:
    from datasets import Dataset

    draft = job.selected.with_name(f".{job.selected.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(job.selected, ignore_errors=True)
    draft.mkdir(parents=True)
    place = {row: i for i, row in enumerate(candidates.ids.tolist())}
    scores = candidates.scores[[place[row] for row in picked.ids.tolist()]]
    rows = list(_rows(job.pool, picked, scores, candidates.targets))
    with (draft / "selected.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    Dataset.from_list(rows).save_to_disk(str(draft / "data"))
    np.save(draft / "ids.npy", picked.ids)
    _write_json(draft / "histogram.json", _histogram(candidates, scores))
    _write_json(draft / "examples.json", _examples(job, candidates, picked, dropped))
    kept = np.isin(candidates.ids, picked.ids)
    manifest = {
        "settings": settings_mark(job.plan, job.pool),
        "scorer": parse_spec("scorer", job.plan.selection.scorer)[0],
        "picker": parse_spec("picker", job.plan.selection.picker)[0],
        "num_candidates": job.pool.manifest.num_examples,
        "num_selected": len(picked.ids),
        "num_tokens": int(candidates.num_tokens[kept].sum()),
        "dropped": dict(Counter(_reason_class(reason) for reason in dropped.values())),
    }
    _write_json(draft / MANIFEST, manifest)
    rename_durably(draft, job.selected)


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
    job: SelectionJob, candidates: Candidates, picked: Picked, dropped: Mapping[int, str]
) -> dict[str, Any]:
    """Twenty rows from the top of the choice, and twenty that were not chosen, with the reason:
    filtered ones first, then a spread over the scores."""
    place = {row: i for i, row in enumerate(candidates.ids.tolist())}
    out = candidates.where(~np.isin(candidates.ids, picked.ids))
    order = np.argsort(-np.nan_to_num(out.scores[:, 0], nan=-np.inf), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, _SHOWN_ROWS).astype(int)] if len(order) else []
    rejected = {row: dropped[row] for row in list(dropped)[: _SHOWN_ROWS // 4]}
    for i in spread:
        if len(rejected) < _SHOWN_ROWS:
            rejected[int(out.ids[i])] = "outside the token budget"

    def shown(rows: list[int]) -> Iterator[dict[str, Any]]:
        taken = job.pool.take(np.asarray(rows, dtype=np.int64))
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
