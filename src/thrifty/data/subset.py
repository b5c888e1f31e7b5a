"""Some rows of a store as a store of its own; they keep their ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thrifty.core.ordering import best_first
from thrifty.data.shard import Shard
from thrifty.data.store import MANIFEST, Store, open_store, write_store


def drawn(pool: Store, share: float, seed: int) -> NDArray[np.int64]:
    """Ids of that share of the rows, at least one, drawn at random; ascending."""
    ids = np.concatenate([shard.ids for shard in pool.shards()])
    count = min(len(ids), max(1, round(share * len(ids))))
    order = best_first(np.zeros(len(ids)), ids, seed)
    return np.sort(ids[order[:count]])


def subset(pool: Store, ids: NDArray[np.int64], directory: Path) -> Store:
    """A store of the rows with these ids, in ``directory``; the one that is there if it is done."""
    if not (directory / MANIFEST).is_file():
        manifest = pool.manifest
        parts = (part for shard in pool.shards() if len(part := _part(shard, ids)))
        rows = (pair for part in parts for pair in zip(part.rows, part.tokens, strict=True))
        write_store(
            rows,
            directory,
            manifest.max_length,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        )
    return open_store(directory)


def _part(shard: Shard, ids: NDArray[np.int64]) -> Shard:
    return shard.where(np.isin(shard.ids, ids))
