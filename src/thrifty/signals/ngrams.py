"""Texts as counts of hashed words and pairs of words, many texts at a time.

    features(z) = [ number of 1-grams and 2-grams of z whose hash is b ],  b = 0 .. num_buckets - 1

A hash is CRC-32 of the word, mixed for a pair: the same in every process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Work

_WORD = re.compile(r"\w+|[^\w\s]")
_TOKENS_PER_SECOND = 1.2e6
"""Of counting, a pass."""
_SHARD_ROWS = 4096
_BYTES_PER_TOKEN = 150.0
"""Of a shard: its text, its words' hashes, its sparse counts. Both figures are estimates."""


def hashed_ngrams(texts: Sequence[str], num_buckets: int) -> Any:
    """Counts [len(texts), num_buckets], float64, a scipy ``csr_array``."""
    from scipy.sparse import csr_array

    hashes: list[int] = []
    borders = np.zeros(len(texts) + 1, dtype=np.int64)
    known: dict[str, int] = {}
    for row, text in enumerate(texts):
        for word in _WORD.findall(text.lower()):
            found = known.get(word)
            if found is None:
                found = known[word] = crc32(word.encode())
            hashes.append(found)
        borders[row + 1] = len(hashes)
    words = np.asarray(hashes, dtype=np.uint64)
    rows = np.repeat(np.arange(len(texts)), np.diff(borders))
    same_row = rows[1:] == rows[:-1]
    pairs = _mixed(words[:-1][same_row], words[1:][same_row])
    buckets = np.concatenate([words, pairs]) % np.uint64(num_buckets)
    places = np.concatenate([rows, rows[1:][same_row]])
    ones = np.ones(len(places))
    shape = (len(texts), num_buckets)
    return csr_array((ones, (places, buckets.astype(np.int64))), shape=shape)


def _mixed(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each pair, which depends on their order."""
    with np.errstate(over="ignore"):
        z = first * np.uint64(0x9E3779B97F4A7C15) + second
        z = (z ^ (z >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return z ^ (z >> np.uint64(29))


def ngrams_cost(work: Work, passes: int) -> Cost:
    """Of counting the pool's n-grams so many times, a shard at a time."""
    shard = min(work.pool.num_examples, _SHARD_ROWS) * work.pool.mean_tokens
    return Cost(
        seconds=passes * work.pool.num_tokens / _TOKENS_PER_SECOND,
        peak_memory_bytes=shard * _BYTES_PER_TOKEN,
    )
