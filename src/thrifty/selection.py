"""Which rows to train on: score the pool shard by shard, filter, pick, and leave the choice as
files that anybody's trainer reads.

    scores/NAME-HASH/shard-00000.parquet     one float a row and target; a killed scoring goes on
                                             at the shard, and equal settings reuse the files
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from thrifty import score_cache
from thrifty.core import sums
from thrifty.core.budget import Cost
from thrifty.core.contracts import (
    Candidates,
    Filter,
    Held,
    Models,
    Picked,
    Picker,
    Rows,
    Scorer,
)
from thrifty.core.durable import make_folder
from thrifty.core.ledger import Stage
from thrifty.core.plan import Plan
from thrifty.core.resolve import name_of, parse_spec, resolve
from thrifty.data.shard import Shard
from thrifty.data.store import Store
from thrifty.group_quotas import labels_of, pick_by_group
from thrifty.look import PoolLook
from thrifty.memory_plan import dtype_of
from thrifty.score_names import ScoreNames
from thrifty.scoring_engines import MARGIN, Engine, Scored, ShardScoring
from thrifty.selected import MANIFEST, check_selected, write_selected
from thrifty.signals.models import local_device, num_threads
from thrifty.signals.peak_memory import peak_noted


@dataclass(frozen=True, kw_only=True)
class SelectionJob:
    """Everything that one selection needs, resolved."""

    plan: Plan
    pool: Store
    signals: Mapping[str, Rows]
    held: Held
    models: Models
    names: ScoreNames
    base_sha256: str
    predicted: Cost
    load: Cost
    """Of the base model."""
    predicted_vectors: Cost
    """Of the pool, where a filter or the picker needs them."""
    scores: Path
    selected: Path
    engine: Engine | None = None
    """Where shards are scored; None: here."""
    among: NDArray[np.int64] | None = None
    """Ids of the rows that may be picked; None: all."""


def is_done(selected: Path, mark: str) -> bool:
    """Whether a selection under the settings of ``mark`` lies in ``selected``.

    Raises ValueError where one under other settings does, or where it is damaged.
    """
    manifest = selected / MANIFEST
    if not manifest.is_file():
        return False
    check_selected(selected)
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
        [selection.groups, dict(selection.quotas)],
        selection.seed,
        pool.manifest.fingerprint,
        {name: [t.signal, t.dev, t.test, t.weight] for name, t in plan.targets.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def select(job: SelectionJob, stage: Stage) -> None:
    """Score, filter, pick, write. Raises ValueError where nothing is left to train on."""
    plan = job.plan
    scorer: Scorer = resolve("scorer", plan.selection.scorer)
    folder = _scores_of(job, scorer)
    _score(job, scorer, folder, stage)
    look = _look(job, stage)
    look_for_vectors = [each.needs_vectors for each in _filters(plan)]
    if any([*look_for_vectors, _picker(plan).needs_vectors]):
        look.make_vectors()
    with stage.spending("pick", Cost()) as lease:
        candidates = _candidates(job, scorer, folder, replace(look, lease=lease))
        if job.among is not None:
            candidates = candidates.where(np.isin(candidates.ids, job.among))
        limit = plan.selection.max_tokens or math.inf
        picked, left, dropped = pick(job, candidates, limit)
        assert left.num_tokens[np.isin(left.ids, picked.ids)].sum() <= limit
        made_under = {
            "settings": settings_mark(plan, job.pool),
            "scorer": scorer_name(plan),
            "picker": parse_spec("picker", plan.selection.picker)[0],
            "scores": folder.name,
            "in_targets": _in_targets(job, left.where(np.isin(left.ids, picked.ids))),
        }
        write_selected(job.selected, job.pool, candidates, picked, dropped, made_under)


def scorer_name(plan: Plan) -> str:
    return parse_spec("scorer", plan.selection.scorer)[0]


def _filters(plan: Plan) -> list[Filter]:
    return [resolve("filter", spec) for spec in plan.selection.filters]


def _picker(plan: Plan) -> Picker:
    return resolve("picker", plan.selection.picker)


def pick(
    job: SelectionJob, candidates: Candidates, limit: float
) -> tuple[Picked, Candidates, dict[int, str]]:
    """What to train on of ``candidates``, at most ``limit`` tokens; those that the filters left,
    and why the others are out. Raises ValueError where nothing is left."""
    left = candidates
    dropped: dict[int, str] = {}
    for each in _filters(job.plan):
        found = each.drop(left, job.held)
        dropped |= found
        gone = np.fromiter(found, dtype=np.int64, count=len(found))
        left = left.where(~np.isin(left.ids, gone))
    picked = _pick(job, _picker(job.plan), left, limit)
    if not len(picked.ids):
        raise ValueError(
            f"nothing is left to train on: {len(dropped):,} rows filtered, "
            f"{len(left):,} candidates, {limit:,.0f} tokens to keep\n"
            "hint: raise selection.max_tokens, or look at why rows were dropped"
        )
    return picked, left, dropped


def scored(job: SelectionJob, stage: Stage) -> Candidates:
    """All rows with the scores that a selection left. Raises ValueError where it left none."""
    scorer: Scorer = resolve("scorer", job.plan.selection.scorer)
    folder = _scores_of(job, scorer)
    if not folder.is_dir():
        raise ValueError(
            f"the scores of {name_of(scorer)} are no longer in {job.scores}\n"
            "hint: delete RUN/selected to score again"
        )
    return _candidates(job, scorer, folder, _look(job, stage))


def _in_targets(job: SelectionJob, chosen: Candidates) -> dict[str, int]:
    """Target -> chosen rows whose normalised text is one of its signal rows: they may be trained
    on, but what is learnt from them is no generalisation."""
    prints = [bytes(fingerprint) for fingerprint in chosen.fingerprints]
    found = {}
    for name, rows in job.signals.items():
        known = set(map(bytes, rows.fingerprints))
        found[name] = sum(each in known for each in prints)
    return {name: count for name, count in found.items() if count}


def _pick(job: SelectionJob, picker: Picker, candidates: Candidates, limit: float) -> Picked:
    selection = job.plan.selection
    if not selection.groups:
        return picker.pick(candidates, limit, selection.seed)
    ids = np.concatenate([shard.ids for shard in job.pool.shards()])
    every = labels_of(job.pool, selection.groups)
    labels, seed = every[np.searchsorted(ids, candidates.ids)], selection.seed
    return pick_by_group(
        picker, candidates, labels, selection.quotas, limit, seed, np.unique(every).tolist()
    )


# -- scoring ------------------------------------------------------------------------------------


def _scores_of(job: SelectionJob, scorer: Scorer) -> Path:
    """The folder of its scores."""
    dtype = dtype_of(job.plan.training.memory)
    return job.scores / job.names.of(scorer, job.pool.manifest, dtype)


def _look(job: SelectionJob, stage: Stage) -> PoolLook:
    parts = [job.pool.manifest.fingerprint, job.base_sha256, dtype_of(job.plan.training.memory)]
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
    todo = _to_be_scored(files, stage)
    if not todo:
        return
    if len(todo) == len(files) and (known := score_cache.fetch(folder)) is not None:
        stage.decide(
            "score or take over",
            "take over",
            f"an earlier run left these scores, which took {known['flops']:.3g} FLOPs and "
            f"{known['seconds']:.1f} s then",
            detail=known,
        )
        return
    make_folder(folder)
    signals = job.signals if scorer.needs_target else {}
    # A scoring that does not fit is refused before its first row.
    stage.require(job.predicted * (len(todo) / len(files)), "scoring")
    after = len(files)  # past all shards: what a process made ready went with it
    if _charges(stage, "load", "prepare"):
        stage.roll_back(after - 1, "scoring is made ready again")
    if scorer.needs_model:
        with stage.spending("load", job.load, step=after):
            job.models.other(scorer.model).base()
    with stage.spending("prepare", Cost(), step=after) as lease, peak_noted(lease, local_device()):
        state = scorer.prepare(job.pool, signals, job.models, lease)
    each = _of_a_shard(job.predicted, lease.used, len(files))
    elsewhere: Iterator[Scored] = iter(())
    if job.engine is not None:
        work = ShardScoring(
            scorer=scorer,
            state=state,
            pool=job.pool.directory,
            allowed_flops=each.flops * MARGIN if scorer.needs_model else math.inf,
            num_threads=num_threads(),
        )
        stage.require(each * MARGIN * len(todo), "scoring on workers")
        elsewhere = job.engine(work, todo)
    # Shards that workers give back, and all where there are none, are scored here.
    while todo:
        with stage.spending("score", each, step=todo[0]) as lease:
            scored = next(elsewhere, None)
            if scored is not None:
                lease.tick(scored.cost)
            if scored is None or scored.scores is None:
                shard = todo[0] if scored is None else scored.shard
                with peak_noted(lease, local_device()):
                    scores = scorer.score(job.pool.shard(shard), state, lease)
                scored = Scored(shard, scores, Cost())
            _keep(files[scored.shard], job.pool.shard(scored.shard), scored.scores, scorer, signals)
        todo.remove(scored.shard)
    score_cache.keep(folder, _what_it_cost(job, scorer, stage))


def _to_be_scored(files: list[Path], stage: Stage) -> list[int]:
    """Shards without a file, and those whose charge says that their work was lost: killed between
    leaving the file and settling, they count as what the ledger has."""
    charges = _charges(stage, "score")
    lost = {c["step_from"] for c in charges} - {c["step_from"] for c in charges if not c["lost"]}
    return [i for i, file in enumerate(files) if i in lost or not file.is_file()]


def _charges(stage: Stage, *activities: str) -> list[dict[str, Any]]:
    """What the stage was charged for these."""
    return [
        charge
        for charge in stage.ledger.charges()
        if charge["stage_id"] == stage.id and charge["activity"] in activities
    ]


def _of_a_shard(predicted: Cost, prepared: Cost, num_shards: int) -> Cost:
    """Its part of what was predicted of all scoring, less what preparing took of it: some scorers
    do all their work there. A tenth at least, for predictions are not that sure."""
    left = {
        name: max(
            getattr(predicted, name) - getattr(prepared, name), 0.1 * getattr(predicted, name)
        )
        for name in ("flops", "seconds")
    }
    return replace(predicted, **left) * (1 / num_shards)


def _what_it_cost(job: SelectionJob, scorer: Scorer, stage: Stage) -> dict[str, Any]:
    """And where the scores came from."""
    charges = [c for c in _charges(stage, "load", "prepare", "score") if not c["lost"]]
    return {
        "method": name_of(scorer),
        "models": [path or job.plan.model.path for path in scorer.looks_at],
        "thrifty": version("thrifty"),
        **{name: sum(charge[name] for charge in charges) for name in ("flops", "seconds")},
    }


def _keep(
    file: Path,
    shard: Shard,
    scores: NDArray[np.float32] | None,
    scorer: Scorer,
    signals: Mapping[str, Rows],
) -> None:
    """Write a shard's scores, whole or not at all."""
    expected = (len(shard), max(len(signals), 1))
    assert scores is not None
    assert scores.shape == expected, f"{name_of(scorer)}: {scores.shape}, not {expected}"
    columns = {f"score_{t}": scores[:, t] for t in range(scores.shape[1])}
    aside = file.with_suffix(".new")
    pq.write_table(pa.table({"id": shard.ids, **columns}), aside)
    sums.keep(aside, file)


def _candidates(job: SelectionJob, scorer: Scorer, folder: Path, look: PoolLook) -> Candidates:
    names = tuple(job.signals) if scorer.needs_target else ("all",)
    weights = [job.plan.targets[n].weight if n in job.plan.targets else 1.0 for n in names]
    count, filled = len(job.pool), 0
    ids, tokens = (np.empty(count, dtype=np.int64) for _ in range(2))
    scores = np.empty((count, len(names)), dtype=np.float32)
    prints = np.empty(count, dtype="V16")
    for i, shard in enumerate(job.pool.shards()):
        file = folder / f"shard-{i:05d}.parquet"
        sums.check(file, "delete it; the same command scores those rows again")
        table = pq.read_table(file)
        columns = [table.column(name).to_numpy() for name in table.column_names if name != "id"]
        if not np.array_equal(table.column("id").to_numpy(), shard.ids):
            raise ValueError(
                f"{folder}/shard-{i:05d}.parquet scores other rows than the pool's\n"
                f"hint: delete {folder} to score again"
            )
        rows = slice(filled, filled + len(shard))
        filled = rows.stop
        ids[rows], tokens[rows] = shard.ids, shard.num_tokens
        scores[rows] = np.stack(columns, axis=1)
        prints[rows] = [np.void(p) for p in shard.fingerprints]
    return Candidates(
        ids=ids,
        scores=scores,
        num_tokens=tokens,
        fingerprints=prints,
        targets=names,
        weights=tuple(weights),
        look=look,
    )
