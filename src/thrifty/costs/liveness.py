"""What is alive at each instant of a pass, read off the operations of a piece of the model.

In the forward a tensor lives from the operation that writes it to the last that reads it, and what
autograd keeps lives on. In the backward the operations run in reverse: each holds the gradient it
reads and those it writes, and what it kept goes once the last operation that shares it is done.
Under recomputation the gradients that wait at a layer's output live beside its second forward.

Limits: buffers inside a kernel are not seen, except the few of ``WORKSPACE``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from thrifty.costs.layer import Setup, embedding, head, layers
from thrifty.costs.operations import Operation, Size, recomputed, saved, total
from thrifty.costs.shape import ModelShape

WORKSPACE = {"square": 2.0, "rotate": 1.5, "weigh": 1.0, "gelu_new": 1.0}
"""Buffers that a backward made of several kernels needs beside the gradients, in outputs."""


class Point(NamedTuple):
    """An instant of a pass."""

    kept: Size = Size()
    """What autograd keeps."""
    beside: Size = Size()
    """What lives beside it."""
    done: int = 0
    """Elements of the weights whose gradient the backward has left by now."""
    fresh: int = 0
    """Those of them whose gradient is made at this instant."""


class Piece(NamedTuple):
    """A run of operations: the embedding, a layer, or the head."""

    saved: Size
    """Kept from its forward to its backward."""
    forward: tuple[Point, ...]
    backward: tuple[Point, ...]
    recompute: tuple[Point, ...]
    """Its second forward and its backward, when its input is stored to recompute the rest."""
    weight_elements: int
    """Elements that get a gradient."""


def highest(
    points: Iterable[Point], tokens: int, keys: int, done: float = 0.0, fresh: float = 0.0
) -> Point:
    """The instant that holds most; ``done``, ``fresh``: bytes of an element of their gradients."""

    def held(point: Point) -> float:
        token = point.kept.token + point.beside.token
        keyed = point.kept.map + point.beside.map
        return tokens * (token + keyed * keys) + point.done * done + point.fresh * fresh

    return max(points, key=held)


@lru_cache(maxsize=2048)
def pieces(shape: ModelShape, setup: Setup) -> tuple[Piece, ...]:
    """The embedding, every layer, the head. Equal layers are the same object."""
    known: dict[int, Piece] = {}
    programs = (embedding(shape, setup), *layers(shape, setup), head(shape, setup))
    for operations in programs:
        if id(operations) not in known:
            known[id(operations)] = _piece(operations)
    return tuple(known[id(operations)] for operations in programs)


def _piece(operations: Sequence[Operation]) -> Piece:
    backward, waiting = _backward_points(operations)
    again = _forward_points(operations, len(recomputed(operations)), waiting)
    return Piece(
        saved=total(tensor.size for tensor in saved(operations).values()),
        forward=_forward_points(operations, len(operations)),
        backward=backward,
        recompute=again + _backward_points(operations, stored=True)[0],
        weight_elements=sum(each.weight_elements for each in operations if each.trained),
    )


def _forward_points(
    operations: Sequence[Operation], num_executed: int, waiting: Size | None = None
) -> tuple[Point, ...]:
    """``waiting``: gradients alive throughout a recomputation, whose input is stored elsewhere."""
    last = {t.name: i for i, each in enumerate(operations) for t in (*each.reads, each.writes)}
    keeping = saved(operations)
    kept: dict[str, Size] = {}
    live: dict[str, Size] = {}
    points = [Point()]
    for index, each in enumerate(operations[:num_executed]):
        for tensor in (*each.reads, each.writes, *each.saves):
            (kept if tensor.name in keeping else live)[tensor.name] = tensor.size
        if waiting is not None:
            live["waiting"] = waiting
            live.pop("input", None)
            kept.pop("input", None)
        points.append(Point(total(kept.values()), total(live.values())))
        live = {name: size for name, size in live.items() if last.get(name, -1) > index}
    return tuple(points)


def _backward_points(
    operations: Sequence[Operation], *, stored: bool = False
) -> tuple[tuple[Point, ...], Size]:
    """Also the gradients alive when something saved is first needed: then a layer is recomputed.

    ``stored``: its input is stored elsewhere.
    """
    holders: dict[str, int] = {}
    for each in operations:
        for tensor in each.saves:
            holders[tensor.name] = holders.get(tensor.name, 0) + 1
    kept = {name: tensor.size for name, tensor in saved(operations).items()}
    if stored and "input" in kept:
        kept["input"] = Size()
    result = next(each.writes for each in reversed(operations) if each.kind != "hold")
    gradients = {result.name: result.size}
    points, done, waiting = [Point()], 0, None
    for each in reversed(operations):
        if not each.writes.grad or each.writes.name not in gradients:
            continue
        if each.packs and waiting is None:
            waiting = total(gradients.values())
        written = _gradients_written(each)
        work = each.writes.size.times(WORKSPACE.get(each.kind, 0.0))
        fresh = each.weight_elements if each.trained else 0
        done += fresh
        beside = total((*gradients.values(), *written.values(), work))
        points.append(Point(total(kept.values()), beside, done, fresh))
        del gradients[each.writes.name]
        for name, size in written.items():
            gradients[name] = max(size, gradients.get(name, Size()))
        for tensor in each.saves:
            holders[tensor.name] -= 1
            if not holders[tensor.name]:
                del kept[tensor.name]
    return tuple(points), waiting or Size()


def _gradients_written(operation: Operation) -> dict[str, Size]:
    """The gradient buffers that an operation's backward fills. A sum hands its own on instead: the
    first input of the same size takes it over."""
    needing = {tensor.name: tensor.size for tensor in operation.reads if tensor.grad}
    if operation.kind != "add":
        return needing
    handed = [name for name, size in needing.items() if size == operation.writes.size]
    return {name: Size() if name in handed[1:] else size for name, size in needing.items()}
