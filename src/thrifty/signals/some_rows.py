"""Some rows of a shard, and a pool of some rows: what a method that looks at a part alone is given,
in place of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Pool, Rows, Tokens
from thrifty.core.ordering import random_key


@dataclass(frozen=True)
class SomeRows:
    """Those of ``whole`` at ``places``, in their order (``core.contracts.Rows``)."""

    whole: Any
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.asarray(self.whole.ids[self.places])

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        return np.asarray(self.whole.num_tokens[self.places])

    @property
    def prompts(self) -> Sequence[str]:
        return self._of(self.whole.prompts)

    @property
    def completions(self) -> Sequence[str]:
        return self._of(self.whole.completions)

    @property
    def texts(self) -> Sequence[str]:
        return self._of(self.whole.texts)

    @property
    def tokens(self) -> Sequence[Tokens]:
        return self._of(self.whole.tokens)

    @property
    def fingerprints(self) -> Sequence[bytes]:
        return self._of(self.whole.fingerprints)

    @property
    def rows(self) -> Sequence[Any]:
        """As they were read, which another model's tokenizer splits anew."""
        return self._of(self.whole.rows)

    def _of(self, column: Sequence[Any]) -> list[Any]:
        return [column[place] for place in self.places.tolist()]


def rows_among(rows: Rows, ids: NDArray[np.int64]) -> SomeRows:
    """Those of ``rows`` whose id is among ``ids``, which are sorted."""
    if not len(ids):
        return SomeRows(rows, np.empty(0, dtype=np.int64))
    places = np.minimum(np.searchsorted(ids, rows.ids), len(ids) - 1)
    return SomeRows(rows, np.flatnonzero(ids[places] == rows.ids))


@dataclass(frozen=True)
class SomePool:
    """The rows ``ids``, sorted, of a pool, shard by shard, without shards that have none of
    them."""

    pool: Pool
    ids: NDArray[np.int64]

    @property
    def num_shards(self) -> int:
        return sum(1 for _ in self.shards())

    def shards(self) -> Iterator[SomeRows]:
        for shard in self.pool.shards():
            rows = rows_among(shard, self.ids)
            if len(rows):
                yield rows


def drawn(pool: Pool, count: int, seed: int) -> SomePool:
    """At most ``count`` rows at random: whatever the shards, the same."""
    ids = np.concatenate([shard.ids for shard in pool.shards()])
    chosen = ids[np.argsort(random_key(ids, seed), kind="stable")[:count]]
    return SomePool(pool, np.sort(chosen))
