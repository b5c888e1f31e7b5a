"""How far a journal had come, beside it: the number of its last transaction.

Written after each commit by one store that no kill can tear, and not synced: after a power cut it
may be older than the journal, which tells nothing. It is never newer than what was committed.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

_NUMBER = struct.Struct("<q")
_CHECKSUM = struct.Struct("<I")


def write_head(path: Path, number: int) -> None:
    """Leave ``number`` at ``path``."""
    body = _NUMBER.pack(number)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, body + _CHECKSUM.pack(zlib.crc32(body)))
    finally:
        os.close(descriptor)


def read_head(path: Path) -> int | None:
    """The number; None where there is none, or it is damaged: the journal says more than it."""
    data = path.read_bytes() if path.is_file() else b""
    body, checksum = data[: _NUMBER.size], data[_NUMBER.size :]
    if len(checksum) != _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
        return None
    return int(_NUMBER.unpack(body)[0])
