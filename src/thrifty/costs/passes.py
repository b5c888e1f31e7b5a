"""The forward and the backward of a model at some batches: what each layer keeps, and the most that
lives beside it. Read off the layers' instants (``liveness.py``), once for all settings that run
the same kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.costs.layer import Setup
from thrifty.costs.liveness import pieces
from thrifty.costs.operations import Size, total
from thrifty.costs.shape import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.float64]


class Passes:
    """The forward and the backward of a program at some batches: what each layer keeps, and the
    most that lives beside it. Settings that run the same kernels share it."""

    def __init__(
        self, shape: ModelShape, setup: Setup, micro_batches: tuple[int, ...], sequence: int
    ) -> None:
        self.tokens = np.array(micro_batches, dtype=float) * sequence
        self.keys = float(sequence)
        self.first, *body, self.last = pieces(shape, setup)
        self.kinds = tuple({id(piece): piece for piece in body}.values())
        place = {id(piece): number for number, piece in enumerate(self.kinds)}
        self.kind_of = np.array([place[id(piece)] for piece in body])  # [num_layers]
        self.before = self.bytes(total((self.first.saved, shared_bytes(shape, setup))))
        self.input = self.bytes(self.last.input)
        self.saved = np.stack([self.bytes(kind.saved) for kind in self.kinds])  # [kinds, batches]
        self.products = np.stack([self.bytes(kind.products) for kind in self.kinds])
        elements = np.array([kind.weight_elements for kind in self.kinds], dtype=float)
        per_layer = elements[self.kind_of]
        self.elements = per_layer.sum() + self.last.weight_elements
        # Of weights whose gradients exist when the backward comes to a layer.
        self.done = self.last.weight_elements + (per_layer.sum() - np.cumsum(per_layer))
        self._highest: dict[tuple[str, float, float], tuple[Bytes, Any]] = {}

    def bytes(self, size: Size, tokens: Bytes | None = None) -> Bytes:
        tokens = self.tokens if tokens is None else tokens
        return size.at(tokens, self.keys) + np.zeros_like(tokens)

    def highest(self, mode: str, done: float, fresh: float) -> tuple[Bytes, Any]:
        """The most that each kind of layer holds in ``mode``, and when, [num_kinds, batches]."""
        key = mode, done, fresh
        if key not in self._highest:
            found = [
                getattr(kind, mode).highest(self.tokens, self.keys, done, fresh)
                for kind in self.kinds
            ]
            self._highest[key] = tuple(np.stack(each) for each in zip(*found, strict=True))  # type: ignore[assignment]
        return self._highest[key]


@lru_cache(maxsize=256)
def passes_of(
    shape: ModelShape, setup: Setup, micro_batches: tuple[int, ...], sequence: int
) -> Passes:
    return Passes(shape, setup, micro_batches, sequence)


def shared_bytes(shape: ModelShape, setup: Setup, *, held: bool = False) -> Size:
    """What all layers share: rotary cos and sin, and the masks where something holds them."""
    kinds = 2 if 0 < shape.num_sliding_layers < shape.num_layers else 1
    tables = kinds if shape.rotary_per_kind else 1
    itemsize = 4 if shape.wide_rotary else setup.itemsize
    token = tables * 2.0 * shape.rotary_dim * itemsize if setup.backward else 0.0
    # The model holds its masks during the forward; a recomputation needs them to its end.
    eager = shape.attention == "eager"
    builds = (setup.masked and shape.model_type != "opt") or setup.window_masked or eager
    masks = kinds * (setup.itemsize if eager else 1.0)
    return Size(token, masks if builds and (held or setup.recompute) else 0.0)
