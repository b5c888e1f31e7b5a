"""A row's gradient as bytes: its id and fingerprint, scale and codes, and a seal of all that.

    x_j  ~  scale * code_j,       code: float16, an 8-bit integer, or a sign in one bit

The scale is a row's own: its largest element for 16 and 8 bits (absmax, QLESS, arXiv:2502.01703),
|x| / sqrt(d) for a sign, so that the norm is kept. QLESS quantises the target's gradient as well;
here it stays as it is. A row that is not finite has a scale of NaN, and so has all that is worked
out with it, and nothing else.

The seal is of each row rather than of a file: it tells of what a killed writing left which rows are
whole, and many processes may write to one folder. It finds damage; who can compute it can forge it.

Measured, LoRA of a small model, 512 to 2,048 numbers a row: the order of scores agrees with that of
exact ones (Spearman) to 1.0 for 16 bits, .9997 for 8, and .69 to .90 for one, where the best fifth
shares 60 to 83% of its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = (16, 8, 1)
_SEAL_BYTES = 8


def record(dimensions: int, bits: int) -> np.dtype[np.void]:
    """A row as it lies in a file. Raises ValueError for bits that there are not."""
    if bits not in BITS:
        raise ValueError(f"gradients are not kept in {bits} bits\nhint: 16, 8 or 1")
    codes = {16: ("<f2", dimensions), 8: ("i1", dimensions), 1: ("u1", -(-dimensions // 8))}[bits]
    fields = [
        ("id", "<i8"),
        ("fingerprint", "V16"),
        ("scale", "<f4"),
        ("codes", codes[0], codes[1]),
        ("seal", f"V{_SEAL_BYTES}"),
    ]
    return np.dtype(fields)


def prints_of(fingerprints: Sequence[bytes]) -> NDArray[np.void]:
    """[n], as records have them."""
    return np.array([np.void(each) for each in fingerprints], dtype="V16")


def sealed_records(
    ids: NDArray[np.integer], prints: NDArray[np.void], features: NDArray[np.floating], bits: int
) -> NDArray[np.void]:
    """[n] of ``features`` [n, dimensions]."""
    made = np.empty(len(ids), dtype=record(features.shape[1], bits))
    made["id"], made["fingerprint"] = ids, prints
    made["scale"], made["codes"] = _encoded(features, bits)
    made["seal"] = _seals(made)
    return made


def are_whole(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """[n]: which are as they were written."""
    return np.asarray(records["seal"] == _seals(records))


def decoded(records: NDArray[np.void], dimensions: int, bits: int) -> NDArray[np.float32]:
    """[n, dimensions]"""
    codes = records["codes"]
    if bits == 1:
        values = np.unpackbits(codes, axis=1, count=dimensions).astype(np.float32) * 2 - 1
    else:
        values = codes.astype(np.float32)
    found: NDArray[np.float32] = values * np.asarray(records["scale"])[:, None]
    return found


def _seals(records: NDArray[np.void]) -> NDArray[np.void]:
    width = records.dtype.itemsize
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), width)
    own = (row[: width - _SEAL_BYTES].tobytes() for row in raw)
    digests = (hashlib.blake2b(each, digest_size=_SEAL_BYTES).digest() for each in own)
    return np.frombuffer(b"".join(digests), dtype=f"V{_SEAL_BYTES}")


def _encoded(features: NDArray[np.floating], bits: int) -> tuple[Any, Any]:
    """Scales [n] and codes [n, ...]."""
    x = np.asarray(features, dtype=np.float32)
    finite = np.asarray(np.isfinite(x).all(axis=1))
    x = np.where(finite[:, None], x, np.float32(0))
    largest = np.abs(x).max(axis=1)
    unit = x / np.where(largest > 0, largest, 1)[:, None]  # also of the smallest numbers
    if bits == 16:
        scale, codes = largest, unit.astype("<f2")
    elif bits == 8:
        scale, codes = largest / np.float32(127), np.rint(unit * 127).astype("i1")
    else:
        norms = np.linalg.norm(unit, axis=1) * largest
        scale, codes = norms / np.sqrt(x.shape[1]), np.packbits(x > 0, axis=1)
    return np.where(finite, scale, np.nan), codes
