"""Server-sent events of completions: cut apart where something in them matters, else left alone."""

from __future__ import annotations

import re
from typing import Any

import orjson

MAX_EVENT_BYTES = 8 * 2**20
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": thrifty is sampling\n\n"
"""A comment, which clients pass over."""

_END = re.compile(rb"\r?\n\r?\n")
_MATTERS = re.compile(rb'"usage"\s*:\s*\{|"finish_reason"\s*:\s*"|"error"\s*:|data: ?\[DONE\]')


class TooLong(ValueError):
    """An event that is longer than any answer."""


class EventCutter:
    """Bytes in, whole events out."""

    def __init__(self) -> None:
        self._rest = b""

    def cut(self, piece: bytes) -> list[bytes]:
        """What is whole by now: as one piece where nothing in it matters, else event by event.
        Raises TooLong."""
        text = self._rest + piece
        end = 0
        for found in _END.finditer(text, max(len(self._rest) - 3, 0)):
            end = found.end()
        whole, self._rest = text[:end], text[end:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise TooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
        if not whole or not matters(whole):
            return [whole] if whole else []
        events, start = [], 0
        for found in _END.finditer(whole):
            events.append(whole[start : found.end()])
            start = found.end()
        return events

    def rest(self) -> bytes:
        """What came after the last whole event."""
        rest, self._rest = self._rest, b""
        return rest


def matters(event: bytes) -> bool:
    """Whether it may tell usage, an end or an error. Quotes within texts are escaped, so that what
    a model writes does not look like it."""
    return _MATTERS.search(event) is not None


def data_of(event: bytes) -> dict[str, Any] | None:
    """The JSON object of an event; None where it has none."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    try:
        value = orjson.loads(b"\n".join(lines))
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def is_done(event: bytes) -> bool:
    return event.strip().replace(b" ", b"") == b"data:[DONE]"


def event_of(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
