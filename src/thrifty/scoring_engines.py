"""Scoring shards elsewhere than in this process: worker processes here, or Ray on one machine or
many. The scorer, its state and the code are the same, so scores are equal bit for bit.

    local       one shard after another, in this process (``selection.py``)
    processes   a pool of worker processes, one shard each at a time
    ray         Ray Data: its cluster schedules shards and runs those of a lost machine again

and where a run has several ranks (``ranks.py``), shards are dealt to them in turn.

Workers open the pool by its path, which every machine must see. A worker may spend on a shard what
it was predicted to take and a margin: past that it gives the shard back, to be scored in this
process under the eye of the ledger.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Scorer
from thrifty.data.store import open_store

MARGIN = 1.25
"""Of what a shard was predicted to take."""


class Scored(NamedTuple):
    """What a worker sends back; no scores where it gave the shard back."""

    shard: int
    scores: NDArray[np.float32] | None
    cost: Cost


@dataclass(frozen=True)
class ShardScoring:
    """What a worker needs to know, pickled."""

    scorer: Scorer
    state: Any
    pool: Path
    allowed_flops: float
    num_threads: int

    def of(self, shard: int) -> Scored:
        if self.scorer.needs_model:
            import torch

            torch.set_num_threads(self.num_threads)
        meter = Allowance(self.allowed_flops)
        try:
            scores = self.scorer.score(open_store(self.pool).shard(shard), self.state, meter)
        except AllowanceSpent:
            scores = None
        return Scored(shard, scores, meter.used)


class AllowanceSpent(Exception):
    """A worker may not spend more on its shard."""


@dataclass
class Allowance:
    """A meter that refuses what goes past its limit, before it is done."""

    flops: float
    used: Cost = field(default_factory=Cost)

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        if (self.used + cost).flops > self.flops:
            raise AllowanceSpent
        self.used += cost


Engine = Callable[[ShardScoring, Sequence[int]], Iterator[Scored]]


def engine_named(name: str, workers: int | None = None) -> Engine | None:
    """None for ``local``. Raises ValueError for an unknown name, or where Ray is missing."""
    count = workers or os.cpu_count() or 1
    if name == "local":
        return None
    if name == "processes":
        return lambda work, shards: _in_processes(work, shards, count)
    if name == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ValueError(
                "the engine ray is not installed\nhint: pip install 'thrifty[ray]'"
            ) from None
        return lambda work, shards: _on_ray(work, shards, workers)
    raise ValueError(f"there is no engine {name!r}\nhint: local, processes or ray")


def _in_processes(work: ShardScoring, shards: Sequence[int], count: int) -> Iterator[Scored]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    with ProcessPoolExecutor(
        min(count, len(shards)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_take_over,
        initargs=(pickle.dumps(work),),
    ) as pool:
        try:
            for done in as_completed([pool.submit(_score, shard) for shard in shards]):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def on_ranks(work: ShardScoring, shards: Sequence[int]) -> Iterator[Scored]:
    """As rank 0: a shard for every rank at a time."""
    from thrifty import ranks

    others = DealtShards(work, tuple(shards))
    ranks.tell(others)
    yield from others.each_round()


@dataclass(frozen=True)
class DealtShards:
    """The shards that ranks score together."""

    work: ShardScoring
    shards: tuple[int, ...]

    def follow(self) -> None:
        for _ in self.each_round():
            pass

    def each_round(self) -> Iterator[Scored]:
        """This rank's part; rank 0 is given what all have found."""
        from thrifty import ranks

        for first in range(0, len(self.shards), ranks.world()):
            mine = self.shards[first : first + ranks.world()][ranks.rank() :][:1]
            yield from chain(*ranks.gathered([self.work.of(shard) for shard in mine]))


_work: ShardScoring | None = None


def _take_over(pickled: bytes) -> None:
    global _work
    _work = pickle.loads(pickled)  # from this process's own parent


def _score(shard: int) -> Scored:
    assert _work is not None
    return _work.of(shard)


def _on_ray(work: ShardScoring, shards: Sequence[int], count: int | None) -> Iterator[Scored]:
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    shared = ray.put(pickle.dumps(work))
    rows = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    scored = rows.map(_score_on_ray, fn_args=(shared,), num_cpus=1, concurrency=count)
    for row in scored.iter_rows():
        yield pickle.loads(row["scored"])


def _score_on_ray(row: dict[str, Any], shared: Any) -> dict[str, Any]:
    import ray

    pickled = shared if isinstance(shared, bytes) else ray.get(shared)
    return {"scored": pickle.dumps(_unpickled(pickled).of(int(row["shard"])))}


@lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> ShardScoring:
    found: ShardScoring = pickle.loads(pickled)
    return found
