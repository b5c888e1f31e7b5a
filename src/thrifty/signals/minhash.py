"""Near-duplicate texts: MinHash signatures, and rows that share a band of them (LSH).

    J(A, B) = |A and B| / |A or B|                 of the texts' sets of word ``shingle``-grams
    P(min of a hash over A = min over B) = J       (Broder 1997)

Rows whose signatures agree in all ``rows`` values of one of ``bands`` bands are compared, and are
near if as large a share of their signatures agrees as ``threshold`` asks. Signatures and keys
lie in temporary files, 512 bytes a row and 8 more a band; in memory are the keys of a band at a
time, and signatures of the pairs that are compared.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
NUM_HASHES = 128
_CHUNK = 16384


def shingles(text: str, size: int) -> set[str]:
    """Its runs of ``size`` words; of a shorter text the one run that there is."""
    words = _WORD.findall(text.casefold())
    if len(words) <= size:
        return {" ".join(words)}
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}


def near_pairs(
    texts: Iterator[Sequence[str]], count: int, threshold: float, size: int
) -> NDArray[np.int64]:
    """[pairs, 2] places of texts that are near, the earlier first; of a band's group of equals each
    is compared with the group's first alone."""
    bands, rows = banding(threshold)
    found = [np.zeros((0, 2), dtype=np.int64)]
    with _temporary() as signatures, _temporary() as keys:
        start = 0
        for batch in texts:
            some = _signatures(batch, size)
            signatures.write(some.tobytes())
            for band in range(bands):
                keys.seek(8 * (band * count + start))
                keys.write(_band_keys(some[:, band * rows : (band + 1) * rows]).tobytes())
            start += len(batch)
        for band in range(bands):
            keys.seek(8 * band * count)
            pairs = _same_key(np.frombuffer(keys.read(8 * count), dtype=np.uint64))
            found += _agreeing(signatures, pairs, threshold)
    return np.unique(np.concatenate(found), axis=0)


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="thrifty-minhash-")


def _same_key(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[pairs, 2] places of equal keys: a group's first, and each of the others."""
    order = np.argsort(keys, kind="stable")
    later = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    # A run of places one after another is a group; its first stands right before it.
    begins = np.r_[True, np.diff(later) > 1] if len(later) else np.zeros(0, dtype=bool)
    heads = np.maximum.accumulate(np.where(begins, later - 1, 0))
    return np.stack([order[heads], order[later]], axis=1)


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band) for which a pair at the threshold is compared nine times in ten:
    1 - (1 - t^rows)^bands >= 0.9, with as many rows as that allows."""
    for rows in range(NUM_HASHES, 0, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.9:
            return bands, rows
    return NUM_HASHES, 1


def _signatures(texts: Sequence[str], size: int) -> NDArray[np.uint32]:
    from rensa import RMinHash

    sets = [list(shingles(text, size)) for text in texts]
    matrix = RMinHash.digest_matrix_from_token_sets(sets, num_perm=NUM_HASHES, seed=0)
    return np.asarray(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), NUM_HASHES)


def _band_keys(band: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """[n]: one hash of the values of a band, [n, rows]; two that differ share it once in 2^64."""
    keys = np.zeros(len(band), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in band.T.astype(np.uint64):
            z = keys * np.uint64(0x9E3779B97F4A7C15) + column
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            keys = z ^ (z >> np.uint64(27))
    return keys


def _agreeing(
    signatures: IO[bytes], pairs: NDArray[np.int64], threshold: float
) -> list[NDArray[np.int64]]:
    found = []
    for begin in range(0, len(pairs), _CHUNK):
        some = pairs[begin : begin + _CHUNK]
        places, at = np.unique(some, return_inverse=True)
        held = _read(signatures, places)
        one, two = at.reshape(-1, 2).T
        share = (held[one] == held[two]).mean(axis=1)
        found.append(some[share >= threshold])
    return found


def _read(signatures: IO[bytes], places: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[n, NUM_HASHES]; not mapped, since what was looked at would then stay in memory."""
    width = 4 * NUM_HASHES
    held = np.empty((len(places), NUM_HASHES), dtype=np.uint32)
    for row, place in zip(held, places.tolist(), strict=True):
        signatures.seek(place * width)
        row[:] = np.frombuffer(signatures.read(width), dtype=np.uint32)
    return held
