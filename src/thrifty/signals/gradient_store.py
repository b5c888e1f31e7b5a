"""Examples' gradients in few dimensions, kept on disk for targets that are not known yet.

    store.json                    what they are the gradients of; written first
    rows-000000000000-4096.bin    records of a shard's rows (``gradient_records.py``); whole or not
                                  at all
    .rows-...                     of a shard that is being written, as far as it has come

Rows are files mapped to memory and read some at a time, in any order; each is compared with its
seal once a process, before it is used. A killed scoring goes on at the batch: what the shard's file
was to be made of lies beside it. A store of another model, pool, seed or setting is refused.

Limits: one run at a time should write to a store; two waste work, but no file is torn.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from thrifty.core import sums
from thrifty.core.contracts import Pool, Rows
from thrifty.core.durable import rename_durably
from thrifty.signals.gradient_records import are_whole, decoded, prints_of, record, sealed_records

FORMAT = 2
MANIFEST = "store.json"
CHUNK = 2**22
"""Elements of rows that are unpacked at a time."""


def store_bytes(num_rows: int, dimensions: int, bits: int) -> int:
    """Of the rows' files, exactly."""
    return num_rows * record(dimensions, bits).itemsize


@dataclass(frozen=True)
class GradientStore:
    """A folder of rows' gradients; opened with ``open``."""

    folder: Path
    dimensions: int
    bits: int

    @classmethod
    def open(
        cls, folder: Path, dimensions: int, bits: int, made_of: Mapping[str, Any], num_rows: int
    ) -> GradientStore:
        """One that is new, or goes on. ``made_of`` says what the gradients depend on, in plain
        values; ``num_rows``: that it is going to hold.

        Raises ValueError where it was made of something else, is none, or does not fit the disk.
        """
        store = cls(folder, dimensions, bits)
        wanted = {"format": FORMAT, "dimensions": dimensions, "bits": bits, **made_of}
        wanted = json.loads(json.dumps(wanted))
        path = folder / MANIFEST
        if path.is_file():
            _check(path, wanted)
        elif folder.is_dir() and any(
            each.name[0] != "." and each.name != sums.NAME for each in folder.iterdir()
        ):
            raise ValueError(
                f"{str(folder)!r} holds other files and is no store of gradients\n"
                "hint: name a folder that is empty or not there yet"
            )
        folder.mkdir(parents=True, exist_ok=True)
        missing = store_bytes(num_rows - store.num_rows, dimensions, bits)
        if missing > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"the gradients of {num_rows:,} rows take {missing / 2**30:.1f} GiB more and "
                f"{str(folder)!r} has {free / 2**30:.1f} GiB left\n"
                "hint: fewer bits (8 or 1), fewer dimensions, or another disk"
            )
        if not path.is_file():
            sums.write(path, json.dumps(wanted, indent=1))
        return store

    @property
    def num_rows(self) -> int:
        return sum(int(file.stem.rpartition("-")[2]) for file in self._files())

    @property
    def has_begun(self) -> bool:
        """Whether it holds gradients, be it of a shard that is not whole."""
        return any(self.folder.glob("*rows-*.bin*"))

    @property
    def num_not_finite(self) -> int:
        """Rows that were set apart."""
        return sum(int(np.isnan(each["scale"]).sum()) for each in self._parts())

    @property
    def num_bytes(self) -> int:
        """Of the rows' files, as they are."""
        return sum(file.stat().st_size for file in self._files())

    def holds(self, rows: Rows) -> bool:
        """Raises ValueError where others lie in their place."""
        if not self._file(rows).is_file():
            return False
        self._part(rows)
        return True

    def writing(self, rows: Rows) -> ShardWriting:
        """Of a shard that it does not hold, from what an earlier writing left of it."""
        return ShardWriting(self, rows, self._file(rows))

    def features(self, rows: Rows) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Some rows of a shard at a time: which, and their features [n, dimensions]."""
        part = self._part(rows)
        for some in _chunks(len(part), self.dimensions):
            yield some, decoded(part[some], self.dimensions, self.bits)

    def products(
        self, rows: Rows, directions: NDArray[np.float32], *, cosine: bool = False
    ) -> NDArray[np.float32]:
        """[n, m]: inner products of a shard's rows with m directions [m, dimensions], the rows (not
        the directions) of unit length if asked for. 0 for a row of zeros, NaN for one that is not
        finite."""
        found = np.empty((len(rows), len(directions)), dtype=np.float32)
        for some, features in self.features(rows):
            if cosine:
                norms = np.linalg.norm(features, axis=1, keepdims=True)
                features = features / np.maximum(norms, 1e-30)
            # One target at a time: a row's sum does not depend on the rows or targets beside it.
            for place, towards in enumerate(directions):
                found[some, place] = np.einsum("nd,d->n", features, towards)
        return found

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.bin"))

    def _file(self, rows: Rows) -> Path:
        return self.folder / f"rows-{int(rows.ids[0]):012d}-{len(rows)}.bin"

    def _parts(self) -> Iterator[NDArray[np.void]]:
        return (self._mapped(file) for file in self._files())

    def _part(self, rows: Rows) -> NDArray[np.void]:
        file = self._file(rows)
        part = self._mapped(file)
        same = len(part) == len(rows) and np.array_equal(part["id"], rows.ids)
        if not same or not np.array_equal(part["fingerprint"], prints_of(rows.fingerprints)):
            raise ValueError(
                f"{str(file)!r} holds other rows than the pool's\n"
                "hint: give the pool a store of its own, or delete this one"
            )
        return part

    def _mapped(self, file: Path) -> NDArray[np.void]:
        """Raises ValueError where a row is not as it was written."""
        kind = record(self.dimensions, self.bits)
        for fault in _faults(file, kind):
            raise ValueError(f"{fault}\nhint: delete it to compute it anew")
        return np.memmap(file, dtype=kind, mode="r")


class ShardWriting:
    """A shard's rows on their way into a store, some at a time and in any order."""

    def __init__(self, store: GradientStore, rows: Rows, file: Path) -> None:
        self._file, self._rows, self._bits = file, rows, store.bits
        self._prints = prints_of(rows.fingerprints)
        self._records = np.empty(len(rows), dtype=record(store.dimensions, store.bits))
        self.there = np.zeros(len(rows), dtype=bool)
        """[n]: of which rows the gradients are known."""
        self._aside = self._new_name()
        left = list(file.parent.glob(f".{file.name}.*"))
        for each in left:
            with suppress(FileNotFoundError):  # another run has taken it over
                self._take_over(each)
        if self.there.any():
            self._append(self._records[self.there])
        for each in left:
            each.unlink(missing_ok=True)

    def add(self, places: Sequence[int], features: NDArray[np.floating]) -> None:
        """``features`` [n, dimensions] of the rows at ``places``."""
        chosen = np.asarray(places)
        made = sealed_records(self._rows.ids[chosen], self._prints[chosen], features, self._bits)
        self._append(made)
        self._records[chosen], self.there[chosen] = made, True

    def finish(self) -> None:
        """Give the shard its file, once all rows are there; one that is there already stays."""
        assert self.there.all()
        if not self._file.is_file():
            whole = self._new_name()
            self._records.tofile(whole)
            rename_durably(whole, self._file)
        self._aside.unlink(missing_ok=True)

    def _new_name(self) -> Path:
        return self._file.with_name(f".{self._file.name}.{uuid4().hex}")

    def _append(self, records: NDArray[np.void]) -> None:
        """Not synced: a process that is killed loses nothing of it, a power cut what seals tell."""
        with self._aside.open("ab") as stream:
            stream.write(records.tobytes())

    def _take_over(self, left: Path) -> None:
        """Rows that a killed writing left whole."""
        kind = self._records.dtype
        data = left.read_bytes()
        found = np.frombuffer(data, dtype=kind, count=len(data) // kind.itemsize)
        found = found[are_whole(found)]
        order = np.argsort(self._rows.ids)
        places = order[np.searchsorted(self._rows.ids, found["id"], sorter=order) % len(order)]
        same = (self._rows.ids[places] == found["id"]) & (
            self._prints[places] == found["fingerprint"]
        )
        self._records[places[same]], self.there[places[same]] = found[same], True


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a store, in words, whoever made it."""
    told = list(sums.faults(folder))
    yield from told
    if told:
        return  # how rows lie in their files is not known
    made_of = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if made_of["format"] != FORMAT:
        yield f"{str(folder)!r} is of another version: format {made_of['format']}, not {FORMAT}"
        return
    kind = record(made_of["dimensions"], made_of["bits"])
    for file in sorted(folder.glob("rows-*.bin")):
        yield from _faults(file, kind)


def _faults(file: Path, kind: np.dtype[np.void]) -> Iterator[str]:
    seen = file.stat()
    if not seen.st_size or seen.st_size % kind.itemsize:
        yield f"{str(file)!r} is damaged: it is cut off"
        return
    places = _broken(file, kind, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    if places:
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        yield f"{str(file)!r} is damaged: row {places[0]} of it{more} is not as it was written"


@lru_cache(maxsize=1 << 16)
def _broken(file: Path, kind: np.dtype[np.void], *as_it_lies: int) -> tuple[int, ...]:
    """Places of rows that are not as they were written; looked for once a process."""
    records = np.memmap(file, dtype=kind, mode="r")
    return tuple(np.flatnonzero(~are_whole(records)).tolist())


def pool_identity(pool: Pool) -> tuple[str, int]:
    """A hash of the rows' texts and lengths in tokens, in order, however they are in shards, and
    how many there are."""
    count = 0
    texts, lengths = hashlib.sha256(), hashlib.sha256()
    for shard in pool.shards():
        texts.update(b"".join(map(bytes, shard.fingerprints)))
        lengths.update(np.asarray(shard.num_tokens, dtype="<i8").tobytes())
        count += len(shard)
    return hashlib.sha256(texts.digest() + lengths.digest()).hexdigest(), count


def model_identity(model: Any) -> str:
    """A hash of its weights as they are loaded: names, types and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check(path: Path, wanted: Mapping[str, Any]) -> None:
    sums.check(path, f"delete {str(path.parent)!r} to compute it anew")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{str(path)!r} is damaged\nhint: delete {str(path.parent)!r} to compute it anew"
        ) from None
    if differing:
        what = ", ".join(
            f"{name} {_short(found.get(name))} and not {_short(wanted.get(name))}"
            for name in differing
        )
        raise ValueError(
            f"the gradients in {str(path.parent)!r} are of another {differing[0]}: {what}\n"
            "hint: name another folder, or delete this one"
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else str(value)


def _chunks(num_rows: int, dimensions: int) -> Iterator[slice]:
    size = max(1, CHUNK // dimensions)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
