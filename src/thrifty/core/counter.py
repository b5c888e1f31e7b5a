"""A memory-mapped counter of what a lease has used: no fsync a step, and it outlives the process.

Two slots are written in turn, each with a sequence number and a checksum, so that a process killed
between two stores leaves the other slot whole. The kernel writes the page back after a kill; after
a power cut it may be some seconds old.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path

from thrifty.core.budget import Cost

_BODY = struct.Struct("<qqqdddd")  # sequence, lease, steps, flops, tokens, seconds, peak bytes
_CHECKSUM = struct.Struct("<I")
_SLOT_BYTES = 64


class Counter:
    """The writing side; one a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("wb") as file:
            file.write(bytes(2 * _SLOT_BYTES))
            file.flush()
            os.fsync(file.fileno())
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), 2 * _SLOT_BYTES)
        self._sequence = 0

    def write(self, lease_id: int, steps: int, used: Cost) -> None:
        self._sequence += 1
        amounts = (used.flops, used.tokens, used.seconds, used.peak_memory_bytes)
        body = _BODY.pack(self._sequence, lease_id, steps, *amounts)
        start = (self._sequence % 2) * _SLOT_BYTES
        end = start + _BODY.size + _CHECKSUM.size
        self._map[start:end] = body + _CHECKSUM.pack(zlib.crc32(body))

    def close(self) -> None:
        """Close and remove: what it counted has been settled."""
        self._map.close()
        self._file.close()
        self.path.unlink(missing_ok=True)


def read_counter(path: Path, lease_id: int) -> tuple[int, Cost]:
    """Steps and cost that ``lease_id`` had ticked; nothing where the counter is not its own."""
    data = path.read_bytes() if path.is_file() else b""
    newest, steps, cost = 0, 0, Cost()
    for start in (0, _SLOT_BYTES):
        body = data[start : start + _BODY.size]
        checksum = data[start + _BODY.size : start + _BODY.size + _CHECKSUM.size]
        if len(checksum) < _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
            continue
        sequence, owner, count, flops, tokens, seconds, peak = _BODY.unpack(body)
        if owner == lease_id and sequence > newest:
            newest, steps = sequence, count
            cost = Cost(flops=flops, tokens=tokens, seconds=seconds, peak_memory_bytes=peak)
    return steps, cost
