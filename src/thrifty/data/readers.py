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
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from thrifty.data import json_text
from thrifty.data.faults import Fault
from thrifty.data.inflated import Inflated
from thrifty.data.parquet_pages import Pages, pages_of_groups
from thrifty.data.remote import is_url
from thrifty.data.sources import SourceFile

Record = tuple[int, dict[str, Any] | Fault]

BROKEN = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeError)
"""What a file that breaks off, or cannot be opened, raises."""

DOCUMENT_CHARACTERS = 2000
BATCH_BYTES = 16 << 20
REPEATED_BYTES = 64 << 20
"""Of one value that all rows of a batch may share: unpacked, each has it."""
PAGE_BYTES = 256 << 20
"""Of a parquet page, which is unpacked whole."""
END_OF_TEXT = "<|endoftext|>"


def read(file: SourceFile, max_bytes: int) -> Iterator[Record]:
    """The records of one file; memory bounded by a few records (parquet: by pages)."""
    with file.open() as stream:
        if file.gzipped:
            stream = cast(BinaryIO, Inflated(cast(gzip.GzipFile, stream)))
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
    text = _TextLines(stream, max_bytes)
    reader = csv.reader(text, delimiter="\t" if file.format == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        number = text.number + 1
        try:
            cells = _next_record(reader, text, max_bytes)
        except StopIteration:
            return
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


def _next_record(reader: Iterator[list[str]], text: _TextLines, max_bytes: int) -> list[str]:
    """Its cells, or a ``Fault``. Raises StopIteration at the end."""
    text.begin_record()
    # The csv module's limit on a cell (128 KiB) belongs to the process: lend it, give it back.
    # A line alone does not reach it: where it is passed, the cell is a quoted one of many lines.
    limit = csv.field_size_limit(max_bytes + 8)
    try:
        return next(reader)
    except csv.Error as error:
        if "field limit" not in str(error):
            raise Fault("bad_csv", str(error)[:200]) from None
        text.push_back('"' + text.line)
        raise _passed_over(reader, text, max_bytes) from None
    except Fault:
        if not text.in_quotes:
            raise
        text.push_back('"')
        raise _passed_over(reader, text, max_bytes) from None
    finally:
        csv.field_size_limit(limit)


def _passed_over(reader: Iterator[list[str]], text: _TextLines, max_bytes: int) -> Fault:
    """Read the rest of a record whose quoted cell is too long, and keep none of it: a reader that
    began anew within the cell would take its end for the beginning of another."""
    while True:
        try:
            next(reader)
        except csv.Error as error:
            if "field limit" in str(error):
                text.push_back('"' + text.line)
                continue
        except Fault:
            if text.in_quotes:
                text.push_back('"')
                continue
        except StopIteration:
            pass
        detail = f"a record down to line {text.number:,}; the limit is {max_bytes:,} bytes"
        return Fault("over_long", detail)


class _TextLines:
    """Decoded lines for the csv module; an over-long one is raised, and reading can go on."""

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self._stream = stream
        self._lines = json_text.lines(cast(BinaryIO, self), max_bytes)
        self._waiting: list[str] = []
        self._quotes = 0
        self.number = 0
        self.line = ""

    def readline(self, size: int) -> bytes:
        line = self._stream.readline(size)
        self._quotes += line.count(b'"')
        return line

    def begin_record(self) -> None:
        self._quotes = 0

    @property
    def in_quotes(self) -> bool:
        """Whether an over-long line ended within a quoted cell, as far as its quotes tell."""
        return self._quotes % 2 == 1

    def push_back(self, line: str) -> None:
        """Read ``line`` once more."""
        self._waiting.append(line)

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        if self._waiting:
            return self._waiting.pop()
        self.number, line = next(self._lines)
        if isinstance(line, Fault):
            raise line
        self.line = line.decode("utf-8", "surrogateescape")
        return self.line


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
    number = 1
    for index, pages in enumerate(_pages(stream, file, table.metadata)):
        group = table.metadata.row_group(index)
        if pages.largest > PAGE_BYTES:
            detail = f"rows {number:,} to {number + group.num_rows - 1:,}, a page of "
            detail += f"{pages.largest:,} bytes; the limit is {PAGE_BYTES:,}"
            yield number, Fault("over_long", detail)
        else:
            mean = max(group.total_byte_size // max(group.num_rows, 1), 1)
            most = min(BATCH_BYTES // mean, REPEATED_BYTES // max(pages.repeated, 1), 1024)
            batches = table.iter_batches(batch_size=max(most, 1), row_groups=[index])
            yield from _columns(table.schema_arrow, batches, max_bytes, number)
        number += group.num_rows


def _pages(stream: BinaryIO, file: SourceFile, metadata: Any) -> Iterator[Pages]:
    """As the pages themselves say; of a file at a URL, whose every page would be asked for, as its
    footer does where that is small."""
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if is_url(file.location) and max(sizes, default=0) <= PAGE_BYTES:
        yield from (Pages(largest=size) for size in sizes)
        return
    # No header is looked for in the midst of a group's rows: the reader has the same stream.
    with file.open() as headers:
        try:
            for _, pages in zip(sizes, pages_of_groups(headers), strict=True):
                yield pages
        except ValueError as error:
            raise OSError(str(error)) from None


def _arrow(stream: BinaryIO, file: SourceFile, max_bytes: int) -> Iterator[Record]:
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(stream)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = pa.ipc.open_stream(stream)
        batches = reader
    yield from _columns(reader.schema, map(_checked, batches), max_bytes)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Arrow goes by the offsets in a file wherever they lead, out of its memory too: of a damaged
    file, an ArrowInvalid. Text that is not UTF-8 is told later, cell by cell."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            column.view(_as_bytes(column.type)).validate(full=True)
    return batch


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes wherever it has text."""
    if isinstance(kind, pa.BaseExtensionType):
        return _as_bytes(kind.storage_type)
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _as_bytes(field.type)) for field in kind])
    return kind


def _columns(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], max_bytes: int, number: int = 1
) -> Iterator[Record]:
    """Record batches as rows. Nested columns are kept: messages are lists of structs."""
    names = schema.names
    if len(set(names)) != len(names):
        yield number, Fault("duplicate_keys", "a column name stands twice")
        return
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            part = batch.slice(start, 1024)
            columns = [
                _cells(part.column(i), schema.field(i), max_bytes) for i in range(len(names))
            ]
            for row in range(part.num_rows):
                yield number, _row(names, [column(row) for column in columns])
                number += 1


def _cells(column: pa.Array, field: pa.Field, max_bytes: int) -> Callable[[int], Any]:
    """row -> value, or the ``Fault`` in its place."""
    if column.nbytes > max_bytes and _is_text(field.type):
        lengths = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        if lengths.max(initial=0) > max_bytes:
            return _long_cells(column, lengths, max_bytes)
    try:
        values = column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        # Arrow trusts a writer that says "UTF-8"; find out which cells lie.
        values = list(chain.from_iterable(_cell(column, row) for row in range(len(column))))
    if getattr(field.type, "extension_name", "") == "arrow.json":
        # What datasets makes of a column whose type changes half-way: JSON text in every cell.
        values = [None if value is None else _json_cell(value) for value in values]
    return values.__getitem__


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _long_cells(column: pa.Array, lengths: Any, max_bytes: int) -> Callable[[int], Any]:
    """The same of a column in which a cell is over the limit, a cell at a time."""

    def cell(row: int) -> Any:
        if lengths[row] <= max_bytes:
            return next(_cell(column, row))
        start = column[row].as_buffer().slice(0, 1000).to_pybytes()
        return json_text.over_long(int(lengths[row]), max_bytes, start)

    return cell


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
