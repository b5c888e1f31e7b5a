"""What filters and pickers may look at beside the scores (``contracts.Look``).

    scores/vectors-HASH/shard-00000.npy    float16 [rows, width]; a killed pass goes on at the shard
    scores/vectors-HASH/utility-HASH.npy   float32 [rows, rows] of pairwise utilities

Both come from the base model and are charged to the stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thrifty.core import sums
from thrifty.core.budget import Cost
from thrifty.core.contracts import Models
from thrifty.core.ledger import Stage
from thrifty.core.spending import Lease
from thrifty.data.store import Store
from thrifty.signals.delift import pairwise_utility, pairwise_utility_flops
from thrifty.signals.embeddings import row_vectors
from thrifty.signals.models import local_device
from thrifty.signals.peak_memory import peak_noted

_AGAIN = "delete it; the same command makes it again"


@dataclass(frozen=True, kw_only=True)
class PoolLook:
    """At the pool of a run."""

    pool: Store
    models: Models
    load: Cost
    """Of the base model."""
    predicted: Cost
    """Of the vectors of the whole pool."""
    stage: Stage
    folder: Path
    """Where the vectors lie: named after the pool and the model."""
    lease: Lease | None = None
    """Of filtering and picking, while they are at work."""

    def texts(self) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
        return ((shard.ids, shard.texts) for shard in self.pool.shards())

    def vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raises ValueError where they have not been made."""
        if not all(file.is_file() for file in self._files):
            raise ValueError(
                "no vectors were made\nhint: a method that needs them says needs_vectors"
            )
        for file in self._files:
            sums.check(file, _AGAIN)
        held = [np.load(file, mmap_mode="r") for file in self._files]
        borders = np.cumsum([0, *map(len, held)])
        places = np.searchsorted(self._ids, ids)
        found = np.empty((len(ids), held[0].shape[1]), dtype=np.float32)
        for shard, first, end in zip(held, borders, borders[1:], strict=False):
            here = np.flatnonzero((first <= places) & (places < end))
            found[here] = shard[places[here] - first]
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def pairwise_utility(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Made where it is asked for, since who asks depends on the scores; kept once it is whole.

        Seconds are predicted from FLOPs as those of the vectors are.
        """
        file = self.folder / f"utility-{hashlib.sha256(ids.tobytes()).hexdigest()[:12]}.npy"
        if file.is_file():
            sums.check(file, _AGAIN)
            return np.load(file)
        rows, shape = self.pool.take(ids), self.models.shape
        flops = pairwise_utility_flops(shape, rows.num_tokens.tolist())
        seconds = self.predicted.seconds / max(self.predicted.flops, 1.0) * flops
        predicted = replace(self.predicted, flops=flops, seconds=seconds)
        self.stage.require(self.load + predicted, "comparing rows in pairs")
        assert self.lease is not None
        with peak_noted(self.lease, local_device()):
            found = pairwise_utility(self.models.base(), shape, rows.tokens, self.lease)
        self.folder.mkdir(parents=True, exist_ok=True)
        _save(file, found)
        return found

    def make_vectors(self) -> None:
        """Those that are missing, charged to the stage."""
        todo = [i for i, file in enumerate(self._files) if not file.is_file()]
        if not todo:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        each = self.predicted * (1 / len(self._files))
        self.stage.require(each * len(todo), "embedding the pool")
        with self.stage.spending("load", self.load):
            model = self.models.base()
        for i in todo:
            with (
                self.stage.spending("embed", each, step=i) as lease,
                peak_noted(lease, local_device()),
            ):
                examples = self.pool.shard(i).tokens
                vectors = row_vectors(model, self.models.shape, examples, lease)
                _save(self._files[i], vectors.astype(np.float16))

    @cached_property
    def _files(self) -> list[Path]:
        return [self.folder / f"shard-{i:05d}.npy" for i in range(self.pool.num_shards)]

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        return np.concatenate([shard.ids for shard in self.pool.shards()])


def _save(path: Path, values: NDArray[np.floating]) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".new")
    with aside.open("wb") as file:
        np.save(file, values)
    sums.keep(aside, path)
