"""A memory-mapped counter of what a lease has used: no fsync a step, and it outlives the process.

Two slots are written in turn, each with a sequence number and a checksum, so that a process killed
between two stores leaves the other slot whole. The kernel writes the page back after a kill; after
a power cut it may be some seconds old.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zlib
from pathlib import Path

from thrifty.core.budget import Cost

# sequence, steps; flops, tokens, seconds, joules, dollars (NaN where unknown), peak bytes
_BODY = struct.Struct("<qqdddddd")
_CHECKSUM = struct.Struct("<I")
_SLOT_BYTES = 128


class Counter:
    """The writing side; one a lease. Valid, and on the disk, from the moment it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sequence = 0
        with path.open("w+b") as file:
            file.write(
                bytes(2 * _SLOT_BYTES)
            )  # real blocks: a full disk shows here, not in a store
            file.flush()
            self._map = mmap.mmap(file.fileno(), 2 * _SLOT_BYTES)
            self.write(0, Cost(), 0.0)
            self._map.flush()
            os.fsync(file.fileno())

    def write(self, steps: int, used: Cost, seconds: float) -> None:
        """``seconds`` are apart, for the clock has them and not the sum of the ticks."""
        self._sequence += 1
        body = _BODY.pack(
            self._sequence,
            steps,
            used.flops,
            used.tokens,
            seconds,
            math.nan if used.joules is None else used.joules,
            math.nan if used.dollars is None else used.dollars,
            used.peak_memory_bytes,
        )
        start = (self._sequence % 2) * _SLOT_BYTES
        end = start + _BODY.size + _CHECKSUM.size
        self._map[start:end] = body + _CHECKSUM.pack(zlib.crc32(body))

    def close(self) -> None:
        """Leave the file to whoever recovers the lease."""
        self._map.close()

    def remove(self) -> None:
        """What it counted has been settled."""
        self.close()
        self.path.unlink(missing_ok=True)


def read_counter(path: Path) -> tuple[int, Cost] | None:
    """Steps and cost that were counted; None where no counter is there or none of it is whole."""
    data = path.read_bytes() if path.is_file() else b""
    newest: tuple[int, int, Cost] | None = None
    for start in (0, _SLOT_BYTES):
        body = data[start : start + _BODY.size]
        checksum = data[start + _BODY.size : start + _BODY.size + _CHECKSUM.size]
        if len(checksum) < _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
            continue
        sequence, steps, flops, tokens, seconds, joules, dollars, peak = _BODY.unpack(body)
        cost = Cost(
            flops=flops,
            tokens=tokens,
            seconds=seconds,
            joules=None if math.isnan(joules) else joules,
            dollars=None if math.isnan(dollars) else dollars,
            peak_memory_bytes=peak,
        )
        if newest is None or sequence > newest[0]:
            newest = sequence, steps, cost
    return None if newest is None else newest[1:]
