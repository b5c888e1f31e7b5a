"""Rows of the pool that say nearly the same as a dev or test row, counted while planning.

The ``overlap`` filter drops copies alone, and a row that says nearly the same flatters what is
measured. Compared are the word 5-grams of rows by MinHash (``signals/minhash.py``), at a bounded
price: of a large pool shards are looked at that are spread evenly over it, of a long row its
beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from thrifty.data.shard import Shard
from thrifty.data.store import MANIFEST, Store, open_store
from thrifty.run_folder import RunFolder
from thrifty.signals.minhash import near_pairs

MOST_ROWS = 4_096
"""Of the pool that are looked at, and of dev and test rows; to the end of a shard."""
MOST_CHARACTERS = 2_048
THRESHOLD, SHINGLE = 0.8, 5
"""As of the ``near_duplicates`` filter."""


def of_run(run: RunFolder) -> Iterator[str]:
    """A line where there are any, of the stores that lie in a run folder."""
    pool = open_store(run.pool)
    folders = (path.parent for path in sorted((run.path / "targets").rglob(MANIFEST)))
    held = [open_store(folder) for folder in folders if folder.name in ("dev", "test")]
    near, looked_at = num_near(pool, held)
    if near:
        yield (
            f"{near:,} of {looked_at:,} rows of the pool say nearly the same as a dev or test row "
            f"({THRESHOLD:.0%} of their word {SHINGLE}-grams): they may be trained on, for the "
            "overlap filter drops copies alone"
        )


def num_near(pool: Store, held: Iterable[Store]) -> tuple[int, int]:
    """How many rows of the pool are near one that is held out and no copy of it; of how many."""
    kept: list[str] = []
    copies: set[bytes] = set()
    for store in held:
        for shard in _spread(store):
            kept += _beginnings(shard)
            copies.update(shard.fingerprints)
    shards = list(_spread(pool)) if kept else []
    looked_at = sum(len(shard) for shard in shards)
    texts = chain([kept], map(_beginnings, shards))
    # Those that are held out stand first, so that each is compared with what is near it.
    pairs = near_pairs(texts, len(kept) + looked_at, THRESHOLD, SHINGLE)
    places = np.unique(pairs[(pairs[:, 0] < len(kept)) & (pairs[:, 1] >= len(kept)), 1]) - len(kept)
    prints = [mark for shard in shards for mark in shard.fingerprints]
    return sum(prints[place] not in copies for place in places.tolist()), looked_at


def _beginnings(shard: Shard) -> list[str]:
    return [text[:MOST_CHARACTERS] for text in shard.texts]


def _spread(store: Store) -> Iterator[Shard]:
    """Shards of a store, evenly, until they have enough rows."""
    count = min(store.num_shards, max(1, -(-MOST_ROWS * store.num_shards // max(len(store), 1))))
    for number in np.unique(np.linspace(0, store.num_shards - 1, count).round()).astype(int):
        yield store.shard(int(number))
