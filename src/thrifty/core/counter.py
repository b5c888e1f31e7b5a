"""A memory-mapped counter of what a lease has used: no fsync a step, and it outlives the process.

Two slots are written in turn, each with a sequence number and a checksum, so that a process killed
between two stores leaves the other slot whole. The kernel writes the page back after a kill; after
a power cut it may be some seconds old. Beside what was used stands how much of it is kept whatever
happens, with a checksum of its own: older counters have none there, and nothing that is kept.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from thrifty.core.budget import CONSUMED, Cost

# sequence, steps; flops, tokens, seconds, joules, dollars (NaN where unknown), peak bytes
_BODY = struct.Struct("<qqdddddd")
_KEPT = struct.Struct("<ddddd")
"""flops, tokens, seconds, joules, dollars"""
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

    def write(self, steps: int, used: Cost, seconds: float, kept: Cost | None = None) -> None:
        """``seconds`` are apart, for the clock has them and not the sum of the ticks. ``kept``: of
        what was used, that whose result a kill does not take."""
        self._sequence += 1
        body = _BODY.pack(
            self._sequence,
            steps,
            *_packed(replace(used, seconds=seconds)),
            used.peak_memory_bytes,
        )
        slot = body + _CHECKSUM.pack(zlib.crc32(body)) + _KEPT.pack(*_packed(kept or Cost()))
        slot += _CHECKSUM.pack(zlib.crc32(slot))
        start = (self._sequence % 2) * _SLOT_BYTES
        self._map[start : start + len(slot)] = slot

    def close(self) -> None:
        """Leave the file to whoever recovers the lease."""
        self._map.close()

    def remove(self) -> None:
        """What it counted has been settled."""
        self.close()
        self.path.unlink(missing_ok=True)


def read_counter(path: Path) -> tuple[int, Cost] | None:
    """Steps and cost that were counted; None where no counter is there or none of it is whole."""
    slot = _newest(path)
    if slot is None:
        return None
    _, steps, *amounts, peak = _BODY.unpack(slot[: _BODY.size])
    return steps, replace(_unpacked(amounts), peak_memory_bytes=peak)


def read_kept(path: Path) -> Cost | None:
    """What of that is kept; None where nothing is, or nobody can tell."""
    slot = _newest(path) or b""
    end = _BODY.size + _CHECKSUM.size + _KEPT.size
    if not _is_whole(slot, end):
        return None
    kept = _unpacked(_KEPT.unpack(slot[end - _KEPT.size : end]))
    return None if kept == Cost() else kept


def _newest(path: Path) -> bytes | None:
    data = path.read_bytes() if path.is_file() else b""
    slots = [data[start : start + _SLOT_BYTES] for start in (0, _SLOT_BYTES)]
    whole = [slot for slot in slots if _is_whole(slot, _BODY.size)]
    return max(whole, key=lambda slot: int(_BODY.unpack(slot[: _BODY.size])[0]), default=None)


def _is_whole(slot: bytes, end: int) -> bool:
    """Whether the checksum that stands at ``end`` is that of what comes before it."""
    checksum = slot[end : end + _CHECKSUM.size]
    return checksum == _CHECKSUM.pack(zlib.crc32(slot[:end]))


def _packed(cost: Cost) -> list[float]:
    amounts = (cost.of(name) for name in CONSUMED)
    return [math.nan if amount is None else amount for amount in amounts]


def _unpacked(amounts: Sequence[float]) -> Cost:
    known = [None if math.isnan(amount) else amount for amount in amounts]
    return Cost.from_dict(dict(zip(CONSUMED, known, strict=True)))
