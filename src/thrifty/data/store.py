"""The on-disk store of a pool or a target: valid rows, tokenised, in shards; the bad ones aside.

    shard-00000.parquet ...   rows in reading order, ``shard_rows`` a file, zstd
    quarantine.jsonl          the bad rows: id, file, number, reason, excerpt
    manifest.json             counts, hashes, tokenizer; written last

The manifest is the commit mark: it is written to a temporary name, synced and renamed after all
else is on disk. A folder without one is the remains of a killed build (``unfinished.py``).
Building and reading hold one shard in memory, whatever the size of the pool.

Limits: a store is written once; changed data or another tokenizer mean a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from thrifty.core.budget import PoolStats
from thrifty.core.durable import write_atomically
from thrifty.core.sealed import read_values, sealed, unsealed
from thrifty.core.sums import is_as, sha256_of
from thrifty.data.pool import BadRow, Row
from thrifty.data.shard import SCHEMA, Shard, ShardFile, read_shard, write_shard
from thrifty.data.tokens import Tokens, tokenize_rows
from thrifty.data.unfinished import PROGRESS, Known, Progress, known_rows

FORMAT = 3
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
BATCH_ROWS = 256
MAX_REASONS = 5
ROWS = {
    "sft": "rows need text, prompt and completion, messages, or a pair such as instruction and "
    "output",
    "continued": "rows need text, or prompt and completion",
    "preference": "rows need prompt, chosen and rejected, each a text or a list of messages; with "
    "one answer a row, --task sft trains on them",
}
"""task -> what its rows are."""


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What a store holds, without opening its shards."""

    format: int = FORMAT
    fingerprint: str
    """SHA-256 over the rows' fingerprints in order: their words, whatever the tokenizer, case and
    white space, and where an answer begins."""
    content_sha256: str = ""
    """SHA-256 over the rows as they were read and split; empty in a store that is older."""
    tokenizer_fingerprint: str
    max_length: int
    num_examples: int
    num_bad: dict[str, int] = field(default_factory=dict)
    """code -> rows set aside."""
    num_tokens: int
    num_loss_tokens: int
    num_squared_tokens: int
    num_truncated: int
    num_padded_tokens: int
    """The same with the shorter side of each pair as long as its other one."""
    max_tokens: int
    """Tokens of the longest sequence: of an example, or of a side of a pair."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Histogram: "128" -> examples of 65 to 128 tokens."""
    shards: tuple[ShardFile, ...] = ()
    quarantine_sha256: str | None = None
    """None: an older thrifty's, which did not note it."""

    @property
    def stats(self) -> PoolStats:
        """What pricing needs."""
        return PoolStats(
            num_examples=self.num_examples,
            num_tokens=self.num_tokens,
            max_tokens=self.max_tokens,
            num_loss_tokens=self.num_loss_tokens,
            num_squared_tokens=self.num_squared_tokens,
            num_padded_tokens=self.num_padded_tokens,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoreManifest:
        known = {f.name for f in fields(cls)}
        missing = known - set(values) - {"quarantine_sha256", "content_sha256"}
        if values.get("format") != FORMAT or missing or set(values) - known:
            raise ValueError(
                f"the store's manifest has format {values.get('format')!r}, not {FORMAT}\n"
                "hint: it was written by another version; `thrifty plan` again"
            )
        shards = tuple(ShardFile(**shard) for shard in values["shards"])
        return cls(**{**values, "shards": shards})


def build_store(
    rows: Iterable[Row | BadRow],
    directory: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    shard_rows: int = 4096,
    tokenizer_fingerprint: str,
    task: str = "sft",
    key: str | None = None,
    before: Path | None = None,
) -> StoreManifest:
    """Tokenise ``rows`` and write them to ``directory``, replacing a store that is there. ``key``:
    decides all that it holds; of the same key, rows that were tokenised in ``before`` are not
    tokenised again.

    Rows whose answer is cut off, or that the chat template refuses, join the bad ones. No valid row
    at all is a ``ValueError`` that names the first reasons, and what the rows of ``task`` are.
    """
    return write_store(
        _tokenized(rows, tokenizer, max_length, known_rows(before, key)),
        directory,
        max_length,
        shard_rows=shard_rows,
        tokenizer_fingerprint=tokenizer_fingerprint,
        task=task,
        key=key,
    )


def write_store(
    rows: Iterable[tuple[Row | None, Tokens | BadRow]],
    directory: str | Path,
    max_length: int,
    *,
    shard_rows: int = 4096,
    tokenizer_fingerprint: str,
    task: str = "sft",
    key: str | None = None,
) -> StoreManifest:
    """``build_store`` of rows that are tokenised; a bad one has its reason for tokens."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for remains in (*folder.glob("shard-*.parquet"), folder / PROGRESS):
        remains.unlink(missing_ok=True)
    progress = Progress(folder, key)
    totals = _Totals()
    shards: list[ShardFile] = []
    waiting: list[tuple[Row, Tokens]] = []
    with (folder / QUARANTINE).open("wb") as quarantine:
        for row, result in rows:
            if row is None or isinstance(result, BadRow):
                assert isinstance(result, BadRow)
                totals.add_bad(result)
                quarantine.write(orjson.dumps(asdict(result), option=orjson.OPT_APPEND_NEWLINE))
                continue
            totals.add(row, result)
            waiting.append((row, result))
            if len(waiting) == shard_rows:
                shards.append(write_shard(folder, len(shards), waiting))
                progress.add(shards[-1])
                waiting = []
        if waiting:
            shards.append(write_shard(folder, len(shards), waiting))
        quarantine.flush()
        os.fsync(quarantine.fileno())
    if not shards:
        raise ValueError(totals.nothing_valid(task))
    manifest = totals.manifest(tuple(shards), tokenizer_fingerprint, max_length)
    manifest = replace(manifest, quarantine_sha256=sha256_of(folder / QUARANTINE))
    write_atomically(folder / MANIFEST, json.dumps(sealed(asdict(manifest)), indent=1))
    progress.done()
    return manifest


def open_store(directory: str | Path) -> Store:
    """A finished store, or a ``ValueError``."""
    path = Path(directory) / MANIFEST
    try:
        values = read_values(path)
        if values.get("format") == FORMAT:
            values = unsealed(values, path)
    except FileNotFoundError:
        raise ValueError(
            f"{str(directory)!r} holds no finished store: it has no {MANIFEST}\n"
            "hint: put it back, or `thrifty plan` again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}\nhint: `thrifty plan` again") from None
    return Store(Path(directory), StoreManifest.from_dict(values))


def _tokenized(
    rows: Iterable[Row | BadRow], tokenizer: Any, max_length: int, known: Iterator[Known]
) -> Iterator[tuple[Row | None, Tokens | BadRow]]:
    """The rows in order, tokenised ``BATCH_ROWS`` at a time, but for those that are ``known``."""
    stream, head = iter(rows), next(known, None)
    while batch := list(islice(stream, BATCH_ROWS)):
        found: dict[int, Tokens] = {}
        for row in batch:
            while head is not None and head.id < row.id:  # bad when it was tokenised
                head = next(known, None)
            if head is not None and isinstance(row, Row) and head[:2] == (row.id, row.fingerprint):
                found[row.id] = head.tokens
        new = [row for row in batch if isinstance(row, Row) and row.id not in found]
        results = iter(tokenize_rows(new, tokenizer, max_length))
        for row in batch:
            if not isinstance(row, Row):
                yield None, row
            else:
                yield row, found[row.id] if row.id in found else next(results)


class _Totals:
    """The manifest's numbers, as they grow."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()
        self._exact = hashlib.sha256()
        self._counts: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._max_tokens = 0
        self._first_bad: list[BadRow] = []

    def add(self, row: Row, tokens: Tokens) -> None:
        self._content.update(row.fingerprint)
        self._exact.update(b"%d %d " % (row.id, tokens.border) + orjson.dumps(row.content))
        self._exact.update(np.asarray(tokens.input_ids, dtype=np.int32).tobytes())
        self._exact.update(np.asarray(tokens.loss_mask, dtype=bool).tobytes())
        self._counts["num_examples"] += 1
        self._counts["num_tokens"] += tokens.num_tokens
        self._counts["num_loss_tokens"] += tokens.num_loss_tokens
        sizes = [len(side.input_ids) for side in tokens.sides]
        self._counts["num_squared_tokens"] += sum(size**2 for size in sizes)
        self._counts["num_padded_tokens"] += len(sizes) * max(sizes)
        self._counts["num_truncated"] += tokens.truncated
        self._lengths[1 << (tokens.num_tokens - 1).bit_length()] += 1
        self._max_tokens = max(self._max_tokens, *sizes)

    def add_bad(self, row: BadRow) -> None:
        self._bad[row.code] += 1
        if len(self._first_bad) < MAX_REASONS:
            self._first_bad.append(row)

    def nothing_valid(self, task: str) -> str:
        if not self._first_bad:
            return "the data holds no rows at all\nhint: check that the files are not empty"
        reasons = "; ".join(f"{row.file}:{row.number}: {row.reason}" for row in self._first_bad)
        if set(self._bad) == {"unreadable"}:  # not one row was seen, so its fields are not to blame
            return (
                f"nothing can be read: {reasons}\n"
                "hint: is the file whole, and of the format that its name ends in? a download that "
                "broke off, or a page saved in its place, looks like this"
            )
        return (
            f"none of the {sum(self._bad.values()):,} rows can be used: {reasons}\n"
            f"hint: {ROWS[task]}"
        )

    def manifest(
        self, shards: tuple[ShardFile, ...], tokenizer_fingerprint: str, max_length: int
    ) -> StoreManifest:
        return StoreManifest(
            fingerprint=self._content.hexdigest(),
            content_sha256=self._exact.hexdigest(),
            tokenizer_fingerprint=tokenizer_fingerprint,
            max_length=max_length,
            num_examples=self._counts["num_examples"],
            num_bad=dict(sorted(self._bad.items())),
            num_tokens=self._counts["num_tokens"],
            num_loss_tokens=self._counts["num_loss_tokens"],
            num_squared_tokens=self._counts["num_squared_tokens"],
            num_truncated=self._counts["num_truncated"],
            num_padded_tokens=self._counts["num_padded_tokens"],
            max_tokens=self._max_tokens,
            lengths={str(size): count for size, count in sorted(self._lengths.items())},
            shards=shards,
        )


class Store:
    """A finished store. Nothing is loaded but the manifest until a shard is asked for."""

    def __init__(self, directory: Path, manifest: StoreManifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    def __len__(self) -> int:
        return self.manifest.num_examples

    def shard(self, index: int) -> Shard:
        return Shard(*self._file(self.manifest.shards[index]))

    def shards(self) -> Iterator[Shard]:
        return (self.shard(index) for index in range(self.num_shards))

    def whole(self) -> Shard:
        """All rows at once, of a small store."""
        return self.take(np.concatenate([shard.ids for shard in self.shards()]))

    def take(self, ids: Sequence[int] | NDArray[np.integer]) -> Shard:
        """The rows with these ids, in the order given; they must fit in memory."""
        wanted = np.asarray(ids, dtype=np.int64)
        firsts = [shard.first_id for shard in self.manifest.shards]
        homes = np.searchsorted(firsts, wanted, side="right") - 1
        tables, positions = [SCHEMA.empty_table()], np.empty(len(wanted), dtype=np.int64)
        taken = 0
        for home in np.unique(homes):
            where = np.flatnonzero(homes == home)
            path, sha256 = self._file(self.manifest.shards[max(home, 0)])
            table = read_shard(path, sha256=sha256)
            known = table.column("id").to_numpy()
            places = np.searchsorted(known, wanted[where])
            missing = known[np.minimum(places, len(known) - 1)] != wanted[where]
            if missing.any():
                raise ValueError(
                    f"the store has no row {wanted[where][missing][0]}\n"
                    "hint: ids are those of the valid rows; bad rows are in quarantine.jsonl"
                )
            tables.append(table.take(places))
            positions[where] = taken + np.arange(len(where))
            taken += len(where)
        return Shard(pa.concat_tables(tables).take(positions))

    def _file(self, shard: ShardFile) -> tuple[Path, str]:
        return self.directory / shard.name, shard.sha256

    def quarantine(self) -> Iterator[BadRow]:
        """The rows that were set aside."""
        with (self.directory / QUARANTINE).open("rb") as file:
            for line in file:
                yield BadRow(**orjson.loads(line))

    def verify(self) -> None:
        """A ``ValueError`` that names the first file whose bytes are not those written."""
        for fault in self.faults():
            raise ValueError(f"{fault}\nhint: `thrifty plan` again")

    def faults(self) -> Iterator[str]:
        """The files whose bytes are not those written, in words."""
        files = [self._file(shard) for shard in self.manifest.shards]
        if (noted := self.manifest.quarantine_sha256) is not None:
            files.append((self.directory / QUARANTINE, noted))
        for path, sha256 in files:
            if not path.is_file():
                yield f"{str(path)!r} is missing"
            elif not is_as(path, [sha256]):
                yield f"{str(path)!r} changed since it was written"
