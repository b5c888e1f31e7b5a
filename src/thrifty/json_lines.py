"""Lines of a JSON-lines file, compressed or not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from thrifty.data import json_text
from thrifty.data.faults import Fault

MAX_LINE_BYTES = 64 << 20


def each_row(path: Path) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """(number, row), or what is wrong with the line. Empty lines are left out.

    Raises ValueError where the file is missing or its compression is broken.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}\nhint: a path to JSON lines, .gz or not")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            for number, line in json_text.lines(cast(BinaryIO, stream), MAX_LINE_BYTES):
                if not isinstance(line, bytes) or line.strip():
                    yield number, _row(line)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}\nhint: is it whole?") from error


def _row(line: bytes | Fault) -> dict[str, Any] | Fault:
    if isinstance(line, Fault):
        return line
    try:
        return json_text.parse(line)
    except Fault as fault:
        return fault
