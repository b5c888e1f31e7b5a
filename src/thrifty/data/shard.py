"""One shard of a store: rows and their tokens, a parquet file, read column by column.

A scorer that looks at tokens never decodes the texts, and one that looks at texts never decodes the
tokens: each column is read when it is first asked for, and kept as long as the ``Shard`` is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from thrifty.core.sums import is_as, sha256_of
from thrifty.data.pool import Row
from thrifty.data.tokens import Tokens

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("file", pa.string()),
        ("number", pa.int64()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("content", pa.string()),
        ("extra", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
        ("border", pa.int32()),
        ("num_tokens", pa.int32()),
        ("num_loss_tokens", pa.int32()),
        ("fingerprint", pa.binary(16)),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard as the manifest knows it."""

    name: str
    num_rows: int
    first_id: int
    sha256: str


def write_shard(folder: Path, index: int, rows: Sequence[tuple[Row, Tokens]]) -> ShardFile:
    kept = [row for row, _ in rows]
    tokens = [result for _, result in rows]
    columns = {
        "id": [row.id for row in kept],
        "file": [row.file for row in kept],
        "number": [row.number for row in kept],
        "kind": [row.kind for row in kept],
        "prompt": [row.prompt for row in kept],
        "completion": [row.completion for row in kept],
        "content": [orjson.dumps(row.content).decode() for row in kept],
        "extra": [orjson.dumps(row.extra).decode() for row in kept],
        "input_ids": _lists([t.input_ids for t in tokens], pa.int32()),
        "loss_mask": _lists([t.loss_mask for t in tokens], pa.bool_()),
        "truncated": [t.truncated for t in tokens],
        "border": [t.border for t in tokens],
        "num_tokens": [t.num_tokens for t in tokens],
        "num_loss_tokens": [t.num_loss_tokens for t in tokens],
        "fingerprint": [row.fingerprint for row in kept],
    }
    path = folder / f"shard-{index:05d}.parquet"
    with path.open("wb") as file:
        pq.write_table(pa.table(columns, schema=SCHEMA), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    return ShardFile(
        name=path.name, num_rows=len(rows), first_id=kept[0].id, sha256=sha256_of(path)
    )


def _lists(arrays: list[NDArray[Any]], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), value_type))


def read_shard(path: Path, columns: list[str] | None = None, sha256: str | None = None) -> pa.Table:
    """A shard's file, or a ``ValueError`` where it is not what was written, which ``sha256``
    tells."""
    try:
        if sha256 is None or is_as(path, [sha256]):
            return pq.read_table(path, columns=columns)
        what = "is damaged: it is not as it was written"
    except FileNotFoundError:
        what = "is missing"
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's, not the file's
            raise
        what = f"is damaged: {str(error).partition(chr(10))[0]}"
    raise ValueError(f"{str(path)!r} {what}\nhint: put it back, or `thrifty plan` again")


class Shard:
    """Some rows of a store, column by column (``core.contracts.Rows``)."""

    def __init__(self, source: Path | pa.Table, sha256: str | None = None) -> None:
        """``sha256``: of the file, where it is known."""
        self._source = source
        self._sha256 = sha256
        self._read: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: NDArray[np.bool_]) -> Shard:
        """Some of its rows, in their order."""
        return Shard(self._table().filter(mask))

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._once("ids", lambda: self._numbers("id"))

    @property
    def prompts(self) -> list[str]:
        return self._once("prompts", lambda: self._column("prompt").to_pylist())

    @property
    def completions(self) -> list[str]:
        return self._once("completions", lambda: self._column("completion").to_pylist())

    @property
    def texts(self) -> list[str]:
        return self._once("texts", lambda: [row.text for row in self.rows])

    @property
    def rows(self) -> list[Row]:
        """As they were read, extra columns included."""
        return self._once("rows", self._read_rows)

    @property
    def tokens(self) -> list[Tokens]:
        return self._once("tokens", self._read_tokens)

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        return self._once("num_tokens", lambda: self._numbers("num_tokens"))

    @property
    def num_loss_tokens(self) -> NDArray[np.int64]:
        return self._once("num_loss_tokens", lambda: self._numbers("num_loss_tokens"))

    @property
    def fingerprints(self) -> list[bytes]:
        """16 bytes a row; equal for rows that say the same."""
        return self._once("fingerprints", lambda: self._column("fingerprint").to_pylist())

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._table([name]).column(name)

    def _table(self, columns: list[str] | None = None) -> pa.Table:
        if isinstance(self._source, Path):
            return read_shard(self._source, columns, self._sha256)
        return self._source

    def _numbers(self, name: str) -> NDArray[np.int64]:
        return self._column(name).to_numpy().astype(np.int64)

    def _read_rows(self) -> list[Row]:
        names = ("id", "file", "number", "kind", "content", "extra")
        columns = [self._column(name).to_pylist() for name in names]
        return [
            Row(row_id, file, number, kind, orjson.loads(content), orjson.loads(extra))
            for row_id, file, number, kind, content, extra in zip(*columns, strict=True)
        ]

    def _read_tokens(self) -> list[Tokens]:
        ids, mask = self._split("input_ids"), self._split("loss_mask")
        more = [self._column(name).to_pylist() for name in ("truncated", "border")]
        return [Tokens(*columns) for columns in zip(ids, mask, *more, strict=True)]

    def _split(self, name: str) -> list[NDArray[Any]]:
        lists = self._column(name).combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False)
        borders = np.cumsum([0, *lists.value_lengths().to_pylist()])
        return [values[start:end] for start, end in pairwise(borders)]
