"""One file -> its records, a few at a time: (number, fields or what is wrong) in the file's order.

``number`` is the 1-based line a record starts on (jsonl, csv, txt) or its 1-based row (json,
parquet, arrow). A reader yields a ``Fault`` for a record it cannot give and goes on behind it; when
the file itself breaks off, the exception (one of ``BROKEN``) reaches the caller.

A txt file has no records, so it is cut: at lines that are ``<|endoftext|>``, and otherwise at the
blank line before a paragraph that would take a document past 2,000 characters; where no blank line
comes, at the line end at which 2,000 are reached. Several blank lines become one, and white space
at line ends is dropped.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from thrifty.data import json_text
from thrifty.data.faults import Fault
from thrifty.data.sources import SourceFile

Record = tuple[int, dict[str, Any] | Fault]

BROKEN = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeError)
"""What a file that breaks off, or cannot be opened, raises."""

DOCUMENT_CHARACTERS = 2000
BATCH_BYTES = 16 << 20
END_OF_TEXT = "<|endoftext|>"


def read(file: SourceFile, max_bytes: int) -> Iterator[Record]:
    """The records of one file; memory bounded by a few records (parquet: a row group)."""
    with file.open() as stream:
        yield from _READERS[file.format](stream, file, max_bytes)


def _jsonl(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    for number, line in json_text.lines(stream, max_bytes):
        if isinstance(line, Fault):
            yield number, line
        elif line := line.strip():
            yield number, _parsed(line)


def _parsed(raw: bytes) -> dict[str, Any] | Fault:
    try:
        return json_text.parse(raw)
    except Fault as fault:
        return fault


def _json(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    with file.open() as preview:
        start = json_text.array_start(preview.read(1 << 16))
    if start is None:
        yield from _jsonl(stream, file, max_bytes)
        return
    stream.read(start)
    for number, element in json_text.elements(stream, max_bytes):
        yield number, element if isinstance(element, Fault) else _parsed(element)


def _csv(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    text = _TextLines(json_text.lines(stream, max_bytes))
    reader = csv.reader(text, delimiter="\t" if file.format == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        number = text.number + 1
        try:
            cells = _next_record(reader, max_bytes)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, Fault("bad_csv", str(error)[:200])
            if header is None:
                return
            continue
        except Fault as fault:
            yield number, fault
            if header is None:
                return
            continue
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) != len(header):
                yield number, Fault("duplicate_keys", "a column name stands twice in the header")
                return
            continue
        undecoded = next((cell for cell in cells if not _is_decoded(cell)), None)
        if undecoded is not None:
            yield number, Fault("invalid_utf8", raw=undecoded.encode("utf-8", "surrogateescape"))
        elif len(cells) != len(header):
            detail = f"{len(cells)} cells under a header of {len(header)}"
            yield number, Fault("bad_csv", detail, ",".join(cells)[:1000])
        else:
            yield number, dict(zip(header, cells, strict=True))


def _next_record(reader: Iterator[list[str]], max_bytes: int) -> list[str]:
    # The csv module's limit on a cell (128 KiB) belongs to the process: lend it, give it back.
    limit = csv.field_size_limit(max_bytes)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(limit)


class _TextLines:
    """Decoded lines for the csv module; an over-long one is raised, and reading can go on."""

    def __init__(self, lines: Iterator[tuple[int, bytes | Fault]]) -> None:
        self._lines = lines
        self.number = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, Fault):
            raise line
        return line.decode("utf-8", "surrogateescape")


def _is_decoded(text: str) -> bool:
    """False where ``surrogateescape`` had to stand in for bytes that are not UTF-8."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _txt(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    """Paragraphs joined by blank lines to documents of up to ``DOCUMENT_CHARACTERS``."""
    document: list[str] = []
    size, start = 0, 1
    for number, item in _paragraphs(stream, max_bytes):
        if document and not (isinstance(item, str) and size + len(item) <= DOCUMENT_CHARACTERS):
            yield start, _document(document)
            document, size = [], 0
        if isinstance(item, Fault):
            yield number, item
        elif item is not None:
            start = start if document else number
            document.append(item)
            size += len(item)
    if document:
        yield start, _document(document)


def _paragraphs(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, str | Fault | None]]:
    """(line it starts on, paragraph); None where a document must end."""
    paragraph: list[str] = []
    size, start = 0, 1
    for number, raw in json_text.lines(stream, max_bytes):
        line = "" if isinstance(raw, Fault) else raw.decode("utf-8", "surrogateescape").rstrip()
        ends = isinstance(raw, Fault) or line.strip() in ("", END_OF_TEXT)
        if paragraph and (ends or size >= DOCUMENT_CHARACTERS):
            yield start, "\n".join(paragraph)
            paragraph, size = [], 0
        if isinstance(raw, Fault):
            yield number, raw
        elif line.strip() == END_OF_TEXT:
            yield number, None
        elif not ends:
            start = start if paragraph else number
            paragraph.append(line)
            size += len(line)
    if paragraph:
        yield start, "\n".join(paragraph)


def _document(paragraphs: list[str]) -> dict[str, Any] | Fault:
    text = "\n\n".join(paragraphs)
    if _is_decoded(text):
        return {"text": text}
    return Fault("invalid_utf8", raw=text.encode("utf-8", "surrogateescape"))


def _parquet(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream)
    metadata = table.metadata
    total = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    mean = max(total // max(metadata.num_rows, 1), 1)
    batch_size = min(max(BATCH_BYTES // mean, 1), 1024)
    yield from _columns(table.schema_arrow, table.iter_batches(batch_size=batch_size))


def _arrow(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(stream)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = pa.ipc.open_stream(stream)
        batches = reader
    yield from _columns(reader.schema, batches)


def _columns(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    """Record batches as rows. Nested columns are kept: messages are lists of structs."""
    names = schema.names
    if len(set(names)) != len(names):
        yield 1, Fault("duplicate_keys", "a column name stands twice")
        return
    number = 1
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            part = batch.slice(start, 1024)
            columns = [_cells(part.column(i), schema.field(i)) for i in range(len(names))]
            for row in range(part.num_rows):
                yield number, _row(names, [column(row) for column in columns])
                number += 1


def _cells(column: pa.Array, field: pa.Field) -> Callable[[int], Any]:
    """row -> value, or the ``Fault`` in its place."""
    try:
        values = column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        # Arrow trusts a writer that says "UTF-8"; find out which cells lie.
        values = list(chain.from_iterable(_cell(column, row) for row in range(len(column))))
    if getattr(field.type, "extension_name", "") == "arrow.json":
        # What datasets makes of a column whose type changes half-way: JSON text in every cell.
        values = [None if value is None else _json_cell(value) for value in values]
    return values.__getitem__


def _cell(column: pa.Array, row: int) -> Iterator[Any]:
    try:
        yield column[row].as_py()
    except UnicodeDecodeError as error:
        yield Fault("invalid_utf8", raw=error.object)
    except (ValueError, OverflowError) as error:
        yield Fault("wrong_type", str(error)[:200])


def _json_cell(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return Fault("bad_json", raw=text)


def _row(names: list[str], values: list[Any]) -> dict[str, Any] | Fault:
    fault = next((value for value in values if isinstance(value, Fault)), None)
    return dict(zip(names, values, strict=True)) if fault is None else fault


_READERS: dict[str, Callable[[BinaryIO, SourceFile, int], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "txt": _txt,
}
