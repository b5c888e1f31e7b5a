"""The rows that a plan was asked for: the pool, the targets' parts, what is replayed and guarded,
read, checked and tokenised once, before the budget's clock starts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from thrifty import notes
from thrifty.core.budget import PoolStats
from thrifty.core.plan import Objective, Target
from thrifty.costs.shape import ModelShape
from thrifty.pair_costs import as_sequences
from thrifty.progress import counted
from thrifty.run_folder import RunFolder

# Imported where data are read: a plan of a config alone answers before pyarrow would have loaded.
if TYPE_CHECKING:
    from thrifty.data.pool import BadRow, Row
    from thrifty.data.store import Store, StoreManifest
    from thrifty.preparation import Asked, Say

DEFAULT_MAX_LENGTH = 2048
HELD_OUT_ROWS = 256
"""Dev rows taken from the pool where there is no target."""
POOL_AS_TARGET = "pool"
MOST_TOLD = 20
"""Bad rows that an error names."""


@dataclass(frozen=True)
class Stores:
    """What was read, in numbers."""

    pool: StoreManifest
    targets: Mapping[str, Mapping[str, StoreManifest]]
    guard: StoreManifest | None = None

    def together(self, part: str, task: str) -> PoolStats | None:
        """All targets' rows of a part, as one; of pairs the sequences that a model reads."""
        found = stats_together([parts[part] for parts in self.targets.values() if part in parts])
        return as_sequences(found) if found and task == "preference" else found


def stats_together(manifests: list[StoreManifest]) -> PoolStats | None:
    """Several stores as one; None where there are none."""
    if not manifests:
        return None
    return PoolStats(
        num_examples=sum(m.num_examples for m in manifests),
        num_tokens=sum(m.num_tokens for m in manifests),
        max_tokens=max(m.max_tokens for m in manifests),
        num_loss_tokens=sum(m.num_loss_tokens for m in manifests),
        num_squared_tokens=sum(m.num_squared_tokens for m in manifests),
        num_padded_tokens=sum(m.num_padded_tokens for m in manifests),
    )


def read_asked(
    asked: Asked,
    objective: Objective,
    shape: ModelShape,
    model_folder: Path,
    run: RunFolder,
    say: Say,
    before: Path | None = None,
) -> Stores:
    """Read, check and tokenise all rows that were asked for, into the folder of ``run``.
    ``before``: what a plan that was killed left of the pool. Raises ValueError that says of which
    rows."""
    from thrifty.data import store_cache
    from thrifty.data.pool import read_rows
    from thrifty.data.sources import shown
    from thrifty.data.store import build_store, open_store
    from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint
    from thrifty.data.unfinished import num_known

    tokenizer = load_tokenizer(str(model_folder))
    wish = asked.fixed.get("training.max_length")
    max_length = int(wish or min(DEFAULT_MAX_LENGTH, shape.max_position_embeddings))
    mark = tokenizer_fingerprint(tokenizer)

    def store(
        rows: Iterable[Row | BadRow], directory: Path, key: str | None = None
    ) -> StoreManifest:
        if count := num_known(before, key):
            say(f"  {count:,} rows were tokenised by a plan that was killed")
        return build_store(
            counted(rows, say),
            directory,
            tokenizer,
            max_length,
            tokenizer_fingerprint=mark,
            task=asked.task,
            key=key,
            before=before,
        )

    def large_store(sources: tuple[str, ...], directory: Path) -> StoreManifest:
        """Of rows that may take minutes to read: kept for the next plan."""
        rows = read_rows(sources, task=asked.task)  # looks at the sources at once
        # Of a slow tokenizer the fingerprint is not all that decides.
        parts = (mark, max_length, asked.task) if tokenizer.is_fast else None
        key = store_cache.key_of(sources, *parts) if parts else None
        found = store_cache.fetch(key, directory)
        if found is not None:
            say(f"  as read and tokenised before ({store_cache.VARIABLE}=0 reads anew)")
            return found
        found = store(rows, directory, key)
        if parts and key == store_cache.key_of(sources, *parts):  # else written to meanwhile
            store_cache.keep(key, directory)
        return found

    targets: dict[str, dict[str, StoreManifest]] = {}
    for name, target in asked.targets.items():  # first: they are small, and may be amiss too
        targets[name] = {}
        for part, rows in _target_rows(name, target, asked.task, objective, say).items():
            with _naming(f"the {part} rows of target {name}"):
                targets[name][part] = store(rows, run.target(name, part))
    say(f"reading the pool: {', '.join(map(shown, asked.pool))}")
    with _naming("the pool"):
        pool = large_store(asked.pool, run.pool)
    num_bad = sum(pool.num_bad.values())
    if num_bad:
        say(f"set aside {num_bad:,} bad rows, see pool/quarantine.jsonl: {_counts(pool.num_bad)}")
    say(f"{pool.num_examples:,} rows, {pool.num_tokens:,} tokens")
    if not targets:
        dev = _held_out(open_store(run.pool))
        targets[POOL_AS_TARGET] = {"dev": store(dev, run.target(POOL_AS_TARGET, "dev"))}
    if asked.fixed.get("training.replay"):
        with _naming("the replay rows"):
            large_store(tuple(asked.fixed["training.replay"]), run.replay)
    guard = None
    if sources := asked.fixed.get("guard.sources"):
        with _naming("the guard's rows"):
            guard = store(read_rows(tuple(sources), task=asked.task), run.guard)
            say(
                f"guard: {guard.num_examples:,} rows, {guard.num_tokens:,} tokens, measured at "
                "every evaluation"
            )
    num_dev = {name: parts["dev"].num_examples for name, parts in targets.items()}
    for note in notes.of_rows(asked.targets, num_dev):
        say(note)
    return Stores(pool, targets, guard)


_MASKED = ("empty", "no_assistant", "prompt_too_long", "chat_template")
"""Why a row may have nothing that training could learn, codes of ``faults.REASONS``."""


def check_masked(pool: StoreManifest, most: float) -> None:
    """Raises ValueError where more than the share ``most`` of the rows have nothing to learn."""
    masked = {code: n for code, n in pool.num_bad.items() if code in _MASKED}
    count = sum(masked.values())
    rows = pool.num_examples + count
    if count <= most * rows:
        return
    raise ValueError(
        f"{count:,} of {rows:,} rows of the pool have nothing to learn: "
        f"{_counts(masked)}\nhint: a longer training.max_length, or the template or fields that "
        "the rows are meant for; to train on the others: --set pool.most_masked=1"
    )


def check_nothing_aside(run: RunFolder) -> None:
    """Raises ValueError that names the first rows that were set aside, and counts all by reason."""
    from thrifty.data.store import MANIFEST, open_store

    stores = [open_store(path.parent) for path in sorted(run.path.rglob(MANIFEST))]
    bad = Counter[str]()
    for store in stores:
        bad.update(store.manifest.num_bad)
    if not bad:
        return
    rows = chain.from_iterable(store.quarantine() for store in stores)
    first = [f"{row.file}:{row.number}: {row.reason}" for row in islice(rows, MOST_TOLD)]
    more = f"\nand {bad.total() - MOST_TOLD:,} more" if bad.total() > MOST_TOLD else ""
    raise ValueError(
        f"{bad.total():,} rows cannot be used: {_counts(bad)}\n"
        + "\n".join(first)
        + f"{more}\nhint: mend them, or leave out --strict: they are then set aside, and listed in "
        "quarantine.jsonl"
    )


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """An error in the block says which rows it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def _target_rows(
    name: str, target: Target, task: str, objective: Objective, say: Say
) -> dict[str, list[Row | BadRow]]:
    """Rows by part. Where no dev rows are given, half of the signal's, by hash, become them; a
    metric may have dev and test rows of its own."""
    from thrifty.data.pool import Row, read_rows
    from thrifty.data.splits import part_of
    from thrifty.questions import check_answerable, own_rows

    def read(part: str, sources: tuple[str, ...]) -> list[Row | BadRow]:
        with _naming(f"the {part} rows of target {name}"):
            return list(read_rows(sources, task=task))

    signal = read("signal", target.signal)
    parts: dict[str, list[Row | BadRow]] = {"signal": signal}
    metric = objective.answers
    if metric is not None and metric.asks_own:
        return {**parts, "dev": [*own_rows(metric, "dev")], "test": [*own_rows(metric, "test")]}
    if target.dev:
        parts["dev"] = read("dev", target.dev)
    else:
        halves: dict[str, list[Row | BadRow]] = {"signal": [], "dev": []}
        for row in signal:
            if isinstance(row, Row):
                half = part_of(row.fingerprint, {"signal": 0.5, "dev": 0.5}, seed=0)
                halves[half].append(row)
        if halves["signal"] and halves["dev"]:
            say(f"no --dev for {name}: {len(halves['dev']):,} of its rows steer training instead")
            parts = halves
        elif any(isinstance(row, Row) for row in signal):
            say(f"target {name} has too few rows to split: the same steer selection and training")
            parts["dev"] = signal
    if target.pilot:
        parts["pilot"] = read("pilot", target.pilot)
    if target.test:
        parts["test"] = read("test", target.test)
    for part in ("dev", "pilot", "test"):
        if metric is not None:
            with _naming(f"the {part} rows of target {name}"):
                check_answerable(parts.get(part, ()), metric)
    return parts


def _held_out(pool: Store) -> Iterable[Row]:
    """Dev rows from the pool itself, by hash; the overlap filter keeps them out of training."""
    from thrifty.data.splits import part_of

    num_rows = len(pool)
    if num_rows < 2:
        raise ValueError(
            "one row cannot be trained on and measured on\n"
            "hint: give more rows, or --target ROWS to measure on"
        )
    share = min(0.1, HELD_OUT_ROWS / num_rows)
    rows = (
        (row_id, mark)
        for shard in pool.shards()
        for row_id, mark in zip(shard.ids, shard.fingerprints, strict=True)
    )
    if num_rows < 20:  # a share by hash could be nothing, or all
        taken = [row_id for row_id, _ in islice(rows, num_rows // 2)]
    else:
        parts = {"dev": share, "train": 1 - share}
        held_out = (row_id for row_id, mark in rows if part_of(mark, parts, seed=0) == "dev")
        taken = list(islice(held_out, 2 * HELD_OUT_ROWS))
    return pool.take(taken).rows
