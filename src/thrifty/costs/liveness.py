"""What is alive at each instant of a pass, read off the operations of a piece of the model.

In the forward a tensor lives from the operation that writes it to the last that reads it, and what
autograd keeps lives on. In the backward the operations run in reverse: each holds the gradient it
reads and those it writes, and what it kept goes once the last operation that shares it is done.
Under recomputation the gradients that wait at a layer's output live beside its second forward.

Limits: buffers inside a kernel are not seen, except the few of ``WORKSPACE``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from thrifty.costs.layer import Setup, embedding, head, layers
from thrifty.costs.operations import Operation, Operations, Size, recomputed, saved, total
from thrifty.costs.shape import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORKSPACE = {
    "square": 2.0,
    "rotate": 1.5,
    "weigh": 1.0,
    "weigh_rows": 1.0,
    "weigh_rows_wide": 1.5,  # of two gradients in float32 one is rounded afterwards
    "gelu_new": 1.0,
}
"""Buffers that a backward made of several kernels needs beside the gradients, in outputs."""


NO_GRADIENTS = (0.0, 0.0, 0.0)


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
    updated: int = 0
    """Those that are updated, where a weight is as soon as its gradient is there."""


class Instants(NamedTuple):
    """The points of a pass as columns, to be looked at for many batches at once."""

    points: tuple[Point, ...]
    columns: NDArray[np.float64]  # [num_points, 6]: token, map, fixed, done, fresh, updated

    def highest(
        self,
        tokens: NDArray[Any],
        keys: float,
        gradients: tuple[float, float, float] = NO_GRADIENTS,
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """For each batch the most bytes held and the instant at which they are; ``gradients``:
        bytes of an element that is done, fresh, updated."""
        token, keyed, fixed, *elements = self.columns.T[:, :, None]
        held = tokens * (token + keyed * keys) + fixed
        for number, each in zip(elements, gradients, strict=True):
            held = held + number * each
        at = np.argmax(held, axis=0)
        return held[at, np.arange(held.shape[1])], at


def instants(points: Sequence[Point]) -> Instants:
    rows = np.array([(*p.kept, *p.beside, p.done, p.fresh, p.updated) for p in points], dtype=float)
    columns = np.concatenate([rows[:, :3] + rows[:, 3:6], rows[:, 6:]], axis=1)
    return Instants(tuple(points), columns)


class Piece:
    """A run of operations: the embedding, a layer, or the head. Each pass over it is looked through
    when it is first asked for."""

    def __init__(self, operations: Operations, given: Size) -> None:
        self.operations = operations
        self.input = given
        self.weight_elements = sum(each.weight_elements for each in operations if each.trained)
        """Elements that get a gradient."""
        self._kept = saved(operations)
        self._again = len(recomputed(operations))
        self._outputs = {e.writes.name: e.writes.size for e in operations if e.forward}

    @cached_property
    def saved(self) -> Size:
        """Kept from its forward to its backward."""
        return total(tensor.size for tensor in self._kept.values())

    @cached_property
    def products(self) -> Size:
        """What its products and its attention put out, which selective recomputation keeps."""
        return total(self._outputs.values())

    @cached_property
    def forward(self) -> Instants:
        return instants(_forward_points(self.operations, self._kept))

    @cached_property
    def forward_within(self) -> Instants:
        """The same of a layer, whose caller holds its input until it is done."""
        return instants(_forward_points(self.operations, self._kept, holding=True))

    @property
    def keeps_input(self) -> bool:
        return "input" in self._kept

    @cached_property
    def forward_bare(self) -> Instants:
        """The forward when nothing of it stays: it is made again, or waits on the host."""
        return instants(_forward_points(self.operations, (), waiting=Size()))

    @cached_property
    def forward_selective(self) -> Instants:
        """The forward when the outputs of products stay, and all else is made again."""
        return instants(_forward_points(self.operations, self._outputs, waiting=Size()))

    @cached_property
    def backward(self) -> Instants:
        return instants(self._backward[0])

    @cached_property
    def through(self) -> Instants:
        """The forward and at once the backward, as of the head."""
        points = self.forward.points + self.backward.points
        return Instants(points, np.concatenate([self.forward.columns, self.backward.columns]))

    @cached_property
    def offload(self) -> Instants:
        """The backward when what an operation kept comes from the host as it is needed."""
        return instants(_backward_points(self.operations, offloaded=True)[0])

    @cached_property
    def recompute(self) -> Instants:
        """Its second forward and its backward, when its input is stored to recompute the rest."""
        return instants(self._second_forward({}) + self._stored)

    @cached_property
    def selective(self) -> Instants:
        """The same when the outputs of products are stored as well."""
        # What the second forward stops short of stays in the cache, unused.
        rest = self.operations[self._again :]
        unused = total(each.writes.size for each in rest if each.forward)
        beside = tuple(p._replace(beside=total((p.beside, unused))) for p in self._stored)
        return instants(self._second_forward(self._outputs) + beside)

    @cached_property
    def _backward(self) -> tuple[tuple[Point, ...], Size]:
        return _backward_points(self.operations)

    @cached_property
    def _stored(self) -> tuple[Point, ...]:
        return _backward_points(self.operations, stored=True)[0]

    def _second_forward(self, cached: Mapping[str, Size]) -> tuple[Point, ...]:
        waiting = self._backward[1]
        return _forward_points(self.operations, self._kept, self._again, waiting, cached)


@lru_cache(maxsize=2048)
def pieces(shape: ModelShape, setup: Setup) -> tuple[Piece, ...]:
    """The embedding, every layer, the head. Equal ones are the same object."""
    given = Size(shape.hidden_size * setup.itemsize)
    programs = (embedding(shape, setup), *layers(shape, setup), head(shape, setup))
    return tuple(_piece(operations, given) for operations in programs)


@lru_cache(maxsize=4096)
def _piece(operations: Operations, given: Size) -> Piece:
    return Piece(operations, given)


def _forward_points(
    operations: Sequence[Operation],
    keeping: Collection[str],
    num_executed: int | None = None,
    waiting: Size | None = None,
    cached: Mapping[str, Size] | None = None,
    holding: bool = False,
) -> tuple[Point, ...]:
    """``keeping``: names of what stays; ``waiting``: gradients alive throughout a recomputation;
    then the input is counted elsewhere; ``cached``: what was stored of it, handed out as it is come
    by; ``holding``: the input stays alive to the end."""
    last = {t.name: i for i, each in enumerate(operations) for t in (*each.reads, each.writes)}
    if holding:
        last["input"] = len(operations)
    kept: dict[str, Size] = {}
    live: dict[str, Size] = {}
    cache = dict(cached or {})
    points = [Point()]
    for index, each in enumerate(operations[:num_executed]):
        cache.pop(each.writes.name, None)
        for tensor in (*each.reads, each.writes, *each.saves):
            (kept if tensor.name in keeping else live)[tensor.name] = tensor.size
        if waiting is not None:
            live["waiting"] = waiting
            live.pop("input", None)
            kept.pop("input", None)
        unpacked = Size(fixed=0.0 if each.inside else each.unpacks)
        beside = total((*live.values(), *cache.values(), unpacked))
        if each.inside:
            slices = _forward_points(each.inside, (each.reads[0].name,))
            for point in slices:
                of_slice = point.beside.of_tokens(each.share)
                points.append(Point(total(kept.values()), total((beside, of_slice))))
            beside = total((beside, each.writes.size))  # put together
        points.append(Point(total(kept.values()), beside))
        live = {name: size for name, size in live.items() if last.get(name, -1) > index}
    return tuple(points)


def _backward_points(
    operations: Sequence[Operation], *, stored: bool = False, offloaded: bool = False
) -> tuple[tuple[Point, ...], Size]:
    """Also the gradients alive when something saved is first needed: then a layer is recomputed.

    ``stored``: its input is stored elsewhere; ``offloaded``: all that was kept is, and comes for
    the operation that needs it.
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
        written = _gradients_written(each, gradients[each.writes.name])
        work = each.writes.size.times(WORKSPACE.get(each.kind, 0.0))
        fresh = each.weight_elements if each.trained else 0
        done += fresh
        unpacked = Size(fixed=each.unpacks if written and not each.inside else 0.0)
        beside = total((*gradients.values(), *written.values(), work, unpacked))
        for of_slice in _slice_points(each):
            points.append(Point(total(kept.values()), total((beside, of_slice)), done, fresh))
        if each.inside:
            beside = total((beside, *written.values()))  # the slices' gradients, put together
        here = (kept[tensor.name] for tensor in each.saves) if offloaded else kept.values()
        points.append(Point(total(here), beside, done, fresh))
        del gradients[each.writes.name]
        for tensor in each.saves:
            holders[tensor.name] -= 1
            if not holders[tensor.name]:
                del kept[tensor.name]
        # A product's gradient of what has one already is added to it out of place, once it is done.
        sums = [size for name, size in written.items() if each.forward and name in gradients]
        if sums or fresh:
            beside = total((*gradients.values(), *written.values(), *sums))
            there = Size() if offloaded else total(kept.values())
            points.append(Point(there, beside, done, fresh, fresh))
        for name, size in written.items():
            gradients[name] = max(size, gradients.get(name, Size()))
    return tuple(points), waiting or Size()


def _slice_points(operation: Operation) -> list[Size]:
    """What lives at each instant of the backward of a slice: it runs again, and back; and of the
    largest weight the gradient of this slice beside the sum of the others'."""
    inside = operation.inside
    if not inside:
        return []
    again = _forward_points(inside, saved(inside), len(recomputed(inside)))
    back, _ = _backward_points(inside)
    summed = Size(fixed=operation.summed if operation.share < 1 else 0.0)
    points = (total(point[:2]).of_tokens(operation.share) for point in (*again, *back))
    return [total((point, summed)) for point in points]


def _gradients_written(operation: Operation, own: Size) -> dict[str, Size]:
    """The gradient buffers that an operation's backward fills. A sum hands its ``own`` on instead:
    the first input of the same size takes it over, or nothing where a sum before shared it."""
    needing = {tensor.name: tensor.size for tensor in operation.reads if tensor.grad}
    if operation.kind != "add":
        return needing
    handed = [name for name, size in needing.items() if size == operation.writes.size]
    given = {name: own if name in handed[:1] else Size() for name in handed}
    return needing | given
