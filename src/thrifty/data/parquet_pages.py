"""How large a parquet file's pages are, by their headers alone, before any of them is unpacked.

A reader unpacks whole pages, so the largest bounds what reading takes. The file's footer sums up
columns and may lie; a page's header is what a reader goes by. A value that stands once in a page
and is referred to by many rows (a dictionary, shared prefixes) grows when it is unpacked:
``repeated`` bounds such a value's bytes.

Footer and headers are structs of Thrift's compact protocol, as the parquet format has them. They
are read here, since pyarrow ends the process at some that are damaged when it is asked for them.

Limit: a list of very many references to one long value is one row, whatever the page's size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_DICTIONARY = 2
_DELTA_BYTE_ARRAY = 7
_ROW_GROUPS, _COLUMNS, _COLUMN = 4, 1, 3
_ENCODINGS, _PACKED_BYTES, _DATA_AT, _DICTIONARY_AT = 2, 7, 9, 11
"""Fields of the footer, of a row group, of a column chunk and of its description."""
_WINDOWS = (1 << 12, 1 << 16, 1 << 24)
"""Bytes in which a header is looked for; it may hold the least and greatest value of its page."""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Bytes of a row group's largest page, and of the longest value that many rows may share."""

    largest: int = 0
    repeated: int = 0


def pages_of_groups(stream: BinaryIO) -> Iterator[Pages]:
    """Of each row group. Raises ValueError for a footer or header that is none."""
    stream.seek(-8, os.SEEK_END)
    size = int.from_bytes(stream.read(4), "little")
    stream.seek(-8 - size, os.SEEK_END)
    try:
        for group in _Compact(stream.read(size)).structs_of(_ROW_GROUPS):
            yield _pages(stream, [column[_COLUMN] for column in group[_COLUMNS]])
    except (IndexError, KeyError, TypeError):
        raise ValueError("a footer that cannot be read") from None


def _pages(stream: BinaryIO, columns: list[dict[int, Any]]) -> Pages:
    largest = repeated = 0
    for column in columns:
        shares = _DELTA_BYTE_ARRAY in column[_ENCODINGS]
        for kind, size in _sizes(stream, column):
            largest = max(largest, size)
            if shares or kind == _DICTIONARY:
                repeated = max(repeated, size)
    return Pages(largest=largest, repeated=repeated)


def _sizes(stream: BinaryIO, column: dict[int, Any]) -> Iterator[tuple[int, int]]:
    """Kind and unpacked bytes of each page of a column."""
    at = min(start for start in (column[_DATA_AT], column.get(_DICTIONARY_AT)) if start)
    end = at + column[_PACKED_BYTES]
    while at < end:
        header, length = _header(stream, at)
        kind, unpacked, packed = header[1], header[2], header[3]
        if min(unpacked, packed) < 0:
            raise ValueError("a page of less than no bytes")
        yield kind, unpacked
        at += length + packed


def _header(stream: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """A page's header by its fields, and the header's length."""
    for window in _WINDOWS:
        stream.seek(at)
        reader = _Compact(stream.read(window))
        try:
            return reader.struct(), reader.at
        except IndexError:
            continue
    raise ValueError("a page header that cannot be read")


class _Compact:
    """Thrift's compact protocol. Raises IndexError where the bytes end, ValueError for nonsense."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def structs_of(self, wanted: int) -> Iterator[dict[int, Any]]:
        """The structs of one list in a struct, one by one."""
        for field, kind in self._fields():
            if field == wanted and kind == 9:
                _, count = self._list()
                yield from (self.struct() for _ in range(count))
                return
            self._value(kind, 0)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """By field: numbers, lists and structs; of a text its length."""
        if depth > 8:
            raise ValueError("a header that is nested too deeply")
        return {field: self._value(kind, depth) for field, kind in self._fields()}

    def _fields(self) -> Iterator[tuple[int, int]]:
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._signed()
            yield field, head & 15

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:  # true, false
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._signed()
            case 7:
                return self._passed(8)
            case 8:
                return self._passed(self._number())
            case 9 | 10:
                item, count = self._list()
                return [self._value(item, depth) for _ in range(count)]
            case 12:
                return self.struct(depth + 1)
        raise ValueError("a header with a field that none has")

    def _list(self) -> tuple[int, int]:
        """Kind and number of its items."""
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._number()
        if count > len(self._data):
            raise IndexError
        return head & 15, count

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _passed(self, count: int) -> int:
        self.at += count
        if self.at > len(self._data):
            raise IndexError
        return count

    def _number(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a header with a number that is too long")

    def _signed(self) -> int:
        value = self._number()
        return (value >> 1) ^ -(value & 1)
