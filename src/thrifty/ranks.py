"""The ranks of a run: processes that train together, started by ``torchrun`` or ``launch.py``.

Rank 0 does the run's work as a process alone does: it holds the lock and the ledger, decides and
writes. The others follow: they wait for an order, a dataclass with ``follow()``, and take their
part in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from thrifty import rank_watch, stop_signals
from thrifty.core.budget import Cost

P = ParamSpec("P")
R = TypeVar("R")

_PATIENCE = timedelta(days=7)
"""That a rank waits for the others: scoring may take hours on one of them. Whether they still live
is looked at meanwhile (``rank_watch.py``)."""


class RankLost(RuntimeError):
    """Another rank has ended, or its connection; the run can be resumed."""


class Order(Protocol):
    """What rank 0 has the others do with it; pickled."""

    def follow(self) -> None: ...


def world() -> int:
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextmanager
def together() -> Iterator[None]:
    """All ranks joined; where rank 0 comes to the end of the block, the others' work is over."""
    if world() == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    with rank_watch.watched(rank(), world()):
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        rank_watch.joined()
        try:
            yield
            if rank() == 0:
                tell(None)
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
                raise
            raise RankLost(
                f"rank {rank()} has lost the others: one of them has ended, or its connection\n"
                "hint: the same command goes on from the last checkpoint"
            ) from error
        finally:
            torch.distributed.destroy_process_group()


def led(job: Callable[P, R]) -> Callable[P, R | None]:
    """``job`` as done by rank 0, the others following it; they return None."""

    @wraps(job)
    def on_every_rank(*args: P.args, **kwargs: P.kwargs) -> R | None:
        with together():
            if rank() == 0:
                return job(*args, **kwargs)
            with stop_signals.heeded(_passed_on):
                _follow()
            return None

    return on_every_rank


def _passed_on(reason: str) -> None:
    """Rank 0 hears of a signal to this one, and decides for all."""


def _follow() -> None:
    """Take part in what rank 0 has all do, until it says that all is done, or is gone."""
    while True:
        try:
            order = _heard()
        except RuntimeError:
            return  # it has said why
        if order is None:
            return
        order.follow()


def tell(order: Order | None) -> None:
    """As rank 0: have the others do this; None: all is done."""
    if world() > 1:
        torch.distributed.broadcast_object_list([order], 0, device=torch.device("cpu"))


def _heard() -> Order | None:
    told: list[Any] = [None]
    # From this run's own rank 0, over the machine's own network.
    torch.distributed.broadcast_object_list(told, 0, device=torch.device("cpu"))
    found: Order | None = told[0]
    return found


def wait() -> None:
    """Until all ranks are here."""
    if world() > 1:
        added(np.zeros(1))


def added(values: NDArray[Any]) -> NDArray[Any]:
    """The sum over all ranks, on all of them."""
    summed = torch.from_numpy(values.copy())
    torch.distributed.all_reduce(summed)
    return summed.numpy()


def gathered(found: list[Any]) -> list[list[Any]]:
    """What each rank found, given to rank 0; nothing to the others."""
    every: list[Any] | None = [None] * world() if rank() == 0 else None
    torch.distributed.gather_object(found, every, 0)
    return every or []


def of_rank_0(numbers: list[int]) -> list[int]:
    """What rank 0 calls this with."""
    values = torch.tensor(numbers)
    torch.distributed.broadcast(values, 0)
    return [int(value) for value in values]


def most(number: int) -> int:
    """The largest that a rank calls this with."""
    if world() == 1:
        return number
    value = torch.tensor([number])
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value.item())


def rows_of_rank_0(rows: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """What rank 0 calls this with."""
    if world() == 1:
        return rows
    (size,) = of_rank_0([-1 if rows is None else len(rows)])
    if size < 0:
        return None
    return np.array(of_rank_0([0] * size if rows is None else rows.tolist()), dtype=np.int64)


def summed(used: Cost, device: Any) -> Cost:
    """FLOPs and tokens over all ranks."""
    both = torch.tensor([used.flops, used.tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(both)
    return replace(used, flops=both[0].item(), tokens=both[1].item())


def told(stop: bool, device: Any) -> bool:
    """What rank 0 decided."""
    flag = torch.tensor([int(stop)], device=device)
    torch.distributed.broadcast(flag, 0)
    return bool(flag.item())
