"""What can be wrong with a row: stable codes, words, and excerpts that are safe to print.

Reading never stops at a bad row. Whoever finds one raises or yields a ``Fault``; ``pool.py`` turns
it into a ``BadRow`` with an id, a file and a line. The codes below are stable: they are the keys of
``num_bad`` in a store's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

REASONS: Mapping[str, str] = {
    "bad_json": "not JSON",
    "bad_csv": "not a CSV record of this table",
    "not_an_object": "JSON, but not an object",
    "wrong_type": "a field has the wrong type",
    "wrong_kind": "a row of another task",
    "missing_fields": "no known set of fields",
    "empty": "an empty answer or text",
    "no_assistant": "no assistant turn",
    "same_answers": "chosen and rejected are the same",
    "over_long": "longer than the limit",
    "invalid_utf8": "bytes that are not UTF-8",
    "nul": "a NUL character",
    "lone_surrogate": "half of a surrogate pair",
    "too_deep": "nested too deeply",
    "duplicate_keys": "the same key twice",
    "non_finite": "NaN or infinity where text is wanted",
    "unreadable": "the rest of the file cannot be read",
    "prompt_too_long": "the prompt fills max_length",
    "chat_template": "the chat template cannot say where the answers are",
}

MAX_EXCERPT = 120
MAX_DETAIL = 400


class Fault(Exception):
    """One thing wrong with one row. ``code`` is a key of ``REASONS``."""

    def __init__(self, code: str, detail: str = "", raw: str | bytes = "") -> None:
        self.code = code
        self.reason = f"{code}: {excerpt(detail or REASONS[code], MAX_DETAIL)}"
        self.excerpt = excerpt(raw)
        super().__init__(self.reason)


def excerpt(raw: str | bytes, limit: int = MAX_EXCERPT) -> str:
    """The beginning of ``raw`` on one line of at most ``limit`` characters, all of them printable.

    Control characters, terminal escapes and invisible or right-to-left marks are written as Python
    escapes, so that hostile text stays inert in a terminal, a log and a page.
    """
    start = raw[: 4 * limit]
    text = start.decode("utf-8", "backslashreplace") if isinstance(start, bytes) else start
    shown, length = [], 0
    for character in text:
        piece = character if character.isprintable() else ascii(character)[1:-1]
        if length + len(piece) > limit - 1:
            shown.append("…")
            break
        shown.append(piece)
        length += len(piece)
    return "".join(shown)


def check_text(value: Any, field: str) -> str:
    """``value`` as text that any tokenizer and any file format can take, or a ``Fault``."""
    if not isinstance(value, str):
        if isinstance(value, float) and not math.isfinite(value):
            raise Fault("non_finite", f"{field} is {value}, not text")
        raise Fault("wrong_type", f"{field} is {_json_name(value)}, not text", repr(value))
    if "\0" in value:
        raise Fault("nul", f"{field} holds a NUL character", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            detail = f"{field} holds half of a surrogate pair"
            raise Fault("lone_surrogate", detail, value) from None
    return value


def _json_name(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    names |= {list: "a list", type(None): "null", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
