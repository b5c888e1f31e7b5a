"""JSON text, a piece at a time: lines of a jsonl file, elements of a large array, one record.

Nothing here holds more than one piece: lines are read with a limit and the rest of an over-long one
is passed over, and an array is cut into its elements by its brackets and strings alone, so that a
file of any size takes the memory of one record. ``parse`` is stricter than orjson (a key twice in
one object is an error) and, in one point, more lenient: NaN and infinity, which Python's own
``json.dumps`` writes, are read, and refused later only where text is wanted.

Limits: blank lines are no records. In an array, an element whose brackets do not balance takes
those after it along, for nothing says where it ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from thrifty.data.faults import Fault

CHUNK = 1 << 20
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"

_KEY = re.compile(rb'"\s*:')
_STRING_REST = rb'[^"\\]*+(?:\\.[^"\\]*+)*+("?)'
_IN_STRING = re.compile(_STRING_REST, re.DOTALL)
_STRUCTURE = re.compile(rb'"' + _STRING_REST + rb"|[{}\[\],]", re.DOTALL)
_WRAPPED = re.compile(rb'"data"\s*:\s*\[')


def lines(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | Fault]]:
    """(1-based number, line with its end) of every line; a ``Fault`` for those over the limit."""
    number = 0
    while line := stream.readline(max_bytes + 2):
        number += 1
        if number == 1 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        whole = line.endswith(b"\n") or len(line) < max_bytes + 2
        if whole and len(line.rstrip(b"\r\n")) <= max_bytes:
            yield number, line
            continue
        length, start = len(line), line
        while not line.endswith(b"\n") and (line := stream.readline(CHUNK)):
            length += len(line)
        yield number, over_long(length, max_bytes, start)


def over_long(length: int, max_bytes: int, start: bytes) -> Fault:
    return Fault("over_long", f"{length:,} bytes; the limit is {max_bytes:,}", start)


def parse(raw: bytes) -> dict[str, Any]:
    """One record, or a ``Fault``."""
    try:
        if b"\0" in raw:
            raise Fault("nul", "a NUL byte", raw)
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = _parse_slowly(raw)
        else:
            # As many keys after a '":' as keys kept: none came twice. Where a string holds '":'
            # too, or a key did come twice, the slow parser tells.
            if len(_KEY.findall(raw)) != _num_keys(value):
                value = _parse_slowly(raw)
    except RecursionError:
        raise Fault("too_deep", raw=raw) from None
    if not isinstance(value, dict):
        raise Fault("not_an_object", raw=raw)
    return value


def _parse_slowly(raw: bytes) -> Any:
    """The same with the standard library, which says what orjson leaves open."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8", f"byte {error.start} is not UTF-8", raw) from None
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        detail = f"{error.msg.lower()} at character {error.pos}"
        raise Fault("bad_json", detail, raw) from None
    except ValueError:  # a number of more digits than Python reads
        raise Fault("bad_json", "a number that is too long", raw) from None
    except Fault as fault:
        raise Fault(fault.code, fault.reason.partition(": ")[2], raw) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Fault("duplicate_keys", f"the key {twice[:40]!r} stands twice in one object")
    return value


def _num_keys(value: Any) -> int:
    count, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            count += len(item)
            pending.extend(v for v in item.values() if isinstance(v, (dict, list)))
        elif isinstance(item, list):
            pending.extend(v for v in item if isinstance(v, (dict, list)))
    return count


def array_start(head: bytes) -> int | None:
    """Where the elements of a .json file begin: after ``[`` or ``{"data": [``.

    None for a file that is really jsonl: its first line is a whole object without ``data``.
    """
    text = head.removeprefix(_BOM).lstrip(_SPACE)
    shift = len(head) - len(text)
    if text.startswith(b"["):
        return shift + 1
    wrapped = _WRAPPED.search(text)
    if not text.startswith(b"{") or wrapped is None:
        return None
    first_line = text.split(b"\n", 1)[0]
    try:
        is_record = not isinstance(orjson.loads(first_line).get("data"), list)
    except orjson.JSONDecodeError:
        is_record = False
    return None if is_record else shift + wrapped.end()


def elements(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | Fault]]:
    """(1-based number, bytes) of every element of an array whose ``[`` was read already.

    Counts brackets outside strings; what an element holds is not looked at.
    """
    number, depth, in_string, skip = 1, 0, False, 0
    kept, length = bytearray(), 0

    def add(piece: bytes) -> None:
        nonlocal length
        length += len(piece)
        kept.extend(piece[: max(max_bytes + 1 - len(kept), 0)])

    while chunk := stream.read(CHUNK):
        start, at, skip = 0, skip, 0
        while at < len(chunk):
            found = (_IN_STRING.match if in_string else _STRUCTURE.search)(chunk, at)
            if found is None:
                break
            at, mark = found.end(), found[0]
            if in_string or mark[:1] == b'"':
                in_string = not found[1]
                # A string stops short of the chunk's end only at a last backslash, which escapes
                # the next chunk's first byte.
                skip = int(in_string and at < len(chunk))
                at += skip
            elif mark in b"{[":
                depth += 1
            elif mark in b"}]" and depth > 0:
                depth -= 1
            elif depth == 0:  # a comma between elements, or the array's own end
                add(chunk[start : found.start()])
                start = at
                last = mark != b","
                if kept.strip(_SPACE) or not last:
                    yield number, _element(kept, length, max_bytes)
                if last:
                    return
                number += 1
                kept, length = bytearray(), 0
        add(chunk[start:])
    yield number, Fault("unreadable", "the file ends inside its array", bytes(kept))


def _element(kept: bytearray, length: int, max_bytes: int) -> bytes | Fault:
    if length > max_bytes:
        return over_long(length, max_bytes, bytes(kept[:1000]))
    return bytes(kept.strip(_SPACE))
