"""A gzip stream that gives up where it unpacks to far more than text ever does.

Text packs to a tenth of its size, the same line over and over to a hundredth; deflate can reach a
thousandth. What unpacks to more than ``MOST_TIMES`` its size is a bomb, whatever it holds: reading
it would take hours and fill the disk with rows that were set aside.
"""

from __future__ import annotations

import gzip
from typing import Any, cast

MOST_TIMES = 250
FREE_BYTES = 256 << 20
"""Unpacked bytes that are no harm, however small the file."""
_BETWEEN_BYTES = 16 << 20


class Inflated:
    """Reads as the ``gzip.GzipFile`` in it does. Raises OSError where it is a bomb."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream
        self._size = 0
        self._next = FREE_BYTES

    def read(self, size: int = -1) -> bytes:
        return self._counted(self._stream.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._counted(self._stream.readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._size += len(data)
        if self._size > self._next:
            packed = cast(Any, self._stream).fileobj.tell()
            if self._size > MOST_TIMES * packed:
                raise OSError(f"it unpacks to more than {MOST_TIMES} times its size")
            self._next = self._size + _BETWEEN_BYTES
        return data
