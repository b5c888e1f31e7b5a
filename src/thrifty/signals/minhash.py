"""Near-duplicate texts: MinHash signatures, and rows that share a band of them (LSH).

    J(A, B) = |A and B| / |A or B|                 of the texts' sets of word ``shingle``-grams
    P(min of a hash over A = min over B) = J       (Broder 1997)

Rows whose signatures agree in all ``rows`` values of one of ``bands`` bands are compared, and are
near if as large a share of their signatures agrees as ``threshold`` asks. Signatures lie in a
temporary file, a band at a time is in memory: 16 bytes a row.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
NUM_HASHES = 128
_CHUNK = 65536


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
    with tempfile.TemporaryFile(prefix="thrifty-minhash-") as file:
        signatures = np.memmap(file, np.uint32, "w+", shape=(max(count, 1), NUM_HASHES))
    start = 0
    for batch in texts:
        signatures[start : start + len(batch)] = _signatures(batch, size)
        start += len(batch)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for band in range(bands):
        key = _band_keys(signatures[:count], band * rows, rows)
        order = np.argsort(key, kind="stable")
        first = np.r_[True, key[order][1:] != key[order][:-1]] if count else np.zeros(0, bool)
        heads = order[np.maximum.accumulate(np.where(first, np.arange(count), 0))]
        pairs = np.stack([heads[~first], order[~first]], axis=1)
        found += _agreeing(signatures, pairs, threshold)
    return np.unique(np.concatenate(found), axis=0)


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


def _band_keys(signatures: NDArray[np.uint32], start: int, rows: int) -> NDArray[np.uint64]:
    """[n]: one hash of a band's values; two bands that differ share it once in 2^64."""
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for begin in range(0, len(signatures), _CHUNK):
        chunk = signatures[begin : begin + _CHUNK, start : start + rows].astype(np.uint64)
        with np.errstate(over="ignore"):
            for column in chunk.T:
                z = keys[begin : begin + _CHUNK] * np.uint64(0x9E3779B97F4A7C15) + column
                z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                keys[begin : begin + _CHUNK] = z ^ (z >> np.uint64(27))
    return keys


def _agreeing(
    signatures: NDArray[np.uint32], pairs: NDArray[np.int64], threshold: float
) -> list[NDArray[np.int64]]:
    found = []
    for begin in range(0, len(pairs), _CHUNK):
        some = pairs[begin : begin + _CHUNK]
        share = (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(axis=1)
        found.append(some[share >= threshold])
    return found
