"""What the layers leave on the device from their forward to their backward, and the most that their
passes hold, under one way to recompute or to offload: worked out once for all optimizers and losses
that a search tries with it."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thrifty.costs.liveness import Point
from thrifty.costs.passes import Passes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.float64]


class LayerForward(NamedTuple):
    """The last layer's forward at its highest instant."""

    bytes: Bytes
    """Of all that is kept and lives then, [num_batches]."""
    below: Bytes
    """Of that, what the layers below keep."""
    at: tuple[Point, ...]
    """The instant of each batch."""


class LayerBackward(NamedTuple):
    """The backward of the layer that holds most, at its highest instant."""

    bytes: Bytes
    """Of all that is kept and lives then, and of the gradients that the layers above left."""
    below: Bytes
    done: Bytes
    """Elements of the gradients that the layers above left."""
    at: tuple[Point, ...]


class Stored:
    """Arrays have an entry a layer or a micro-batch, or both: [num_layers, num_batches]."""

    def __init__(self, passes: Passes, every: int, selective: bool, offload: bool) -> None:
        self.passes, self.selective, self.offload = passes, selective, offload
        depth = len(passes.kind_of)
        self.again = np.array([every > 0 and index % every == 0 for index in range(depth)])
        self._backward: dict[tuple[float, float, float], LayerBackward] = {}

    @cached_property
    def layers(self) -> Bytes:
        """What each leaves: all it saves, or its input to recompute from, or nothing."""
        passes = self.passes
        if self.offload:
            return np.zeros((len(passes.kind_of), len(passes.tokens)))
        saved = passes.saved[passes.kind_of]
        if not self.again.any():
            return saved
        instead = passes.input
        if self.selective:
            instead = instead + passes.products[passes.kind_of]
        return np.where(self.again[:, None], instead, saved)

    @cached_property
    def kept(self) -> Bytes:
        """By all layers and before them."""
        return self.passes.before + self.layers.sum(axis=0)

    @cached_property
    def last_forward(self) -> LayerForward:
        """May hold more than the head."""
        passes = self.passes
        bottom, top = (passes.kinds[passes.kind_of[end]] for end in (0, -1))
        points, below = top.forward_within, self.kept - self.layers[-1] + passes.held
        stays = not self.offload and (bottom.keeps_input or self.again[0])
        if len(passes.kind_of) > 1 and not stays:  # the model holds what its embedding put out
            below = below + passes.input
        if self.again[-1] or self.offload:
            bare = not self.selective or self.offload
            points = top.forward_bare if bare else top.forward_selective
            below = below + passes.input
        most, at = points.highest(passes.tokens, passes.keys)
        return LayerForward(below + most, below, tuple(points.points[i] for i in at))

    def backward(self, per_element: tuple[float, float, float]) -> LayerBackward:
        """From the last layer down, each leaving its weights' gradients; ``per_element``: bytes of
        a gradient's element that stays, is made, is updated."""
        if per_element not in self._backward:
            self._backward[per_element] = self._highest_backward(per_element)
        return self._backward[per_element]

    def _highest_backward(self, per_element: tuple[float, float, float]) -> LayerBackward:
        passes, kinds = self.passes, self.passes.kind_of
        modes = {"offload" if self.offload else "backward": ~self.again}
        modes["selective" if self.selective else "recompute"] = self.again
        most = np.zeros_like(self.layers)
        where = np.zeros(self.layers.shape, dtype=int)
        for mode, chosen in modes.items():
            if chosen.any():
                highest, at = passes.highest(mode, per_element)
                most[chosen], where[chosen] = highest[kinds[chosen]], at[kinds[chosen]]
        # What a recomputed layer starts from waits beside its second forward.
        waiting = np.where(self.again[:, None], passes.input, 0.0)
        below = passes.before + np.cumsum(self.layers, axis=0) - self.layers + waiting
        below[0] -= passes.lone  # the lowest layer is of the other kind
        held = below + most + passes.done[:, None] * per_element[0]
        layer = np.argmax(held, axis=0)
        batches = np.arange(len(passes.tokens))
        mode_of = [next(m for m, chosen in modes.items() if chosen[index]) for index in layer]
        at_most = zip(mode_of, kinds[layer], where[layer, batches], strict=True)
        return LayerBackward(
            bytes=held[layer, batches],
            below=below[layer, batches],
            done=passes.done[layer],
            at=tuple(getattr(passes.kinds[kind], mode).points[at] for mode, kind, at in at_most),
        )


@lru_cache(maxsize=512)
def stored_of(passes: Passes, every: int, selective: bool, offload: bool) -> Stored:
    """``every``: how many layers one is run again in the backward; 0: none."""
    return Stored(passes, every, selective, offload)
