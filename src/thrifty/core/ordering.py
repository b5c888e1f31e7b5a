"""Orders that depend on nothing but their arguments: random keys by (seed, id), what fits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_key(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """[n] pseudo-random 64-bit keys, one to one with the ids under a seed (SplitMix64).

    A row's key does not depend on which other rows there are, so neither do ties broken by it.
    """
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def best_first(
    scores: NDArray[np.floating], ids: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Indices by score, highest first; equals by ``random_key``."""
    return np.lexsort((random_key(ids, seed), -scores.astype(np.float64)))


def fill(num_tokens: NDArray[np.int64], max_tokens: float) -> NDArray[np.int64]:
    """Indices, in order, of the rows that fit a token budget, each taken if it still fits."""
    kept, used = [], 0
    smallest = int(num_tokens.min()) if len(num_tokens) else 0
    for place, tokens in enumerate(num_tokens.tolist()):
        if used + tokens <= max_tokens:
            kept.append(place)
            used += tokens
        elif used + smallest > max_tokens:
            break
    return np.asarray(kept, dtype=np.int64)
