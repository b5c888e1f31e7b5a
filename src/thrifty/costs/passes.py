"""The forward and the backward of a model at some batches: what each layer keeps, and the most that
lives beside it. Read off the layers' instants (``liveness.py``), once for all settings that run
the same kernels."""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.costs.layer import Setup, head
from thrifty.costs.liveness import NO_GRADIENTS, Instants, Piece, pieces
from thrifty.costs.operations import Size, saved, total
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
        self.lone = self.bytes(lone_bytes(shape, setup))
        # The masks that the model holds while its layers run.
        held = shared_bytes(shape, setup, held=True)
        self.held = self.bytes(held) - self.bytes(shared_bytes(shape, setup))
        self.input = self.bytes(self.last.input)
        # Kept of what comes before the head's product: of all tokens, however few logits there are.
        normed = takewhile(lambda each: not each.forward, head(shape, setup))
        self.normed = self.bytes(total(x.size for x in saved(tuple(normed)).values()))
        self.saved = np.stack([self.bytes(kind.saved) for kind in self.kinds])  # [kinds, batches]
        self.products = np.stack([self.bytes(kind.products) for kind in self.kinds])
        elements = np.array([kind.weight_elements for kind in self.kinds], dtype=float)
        per_layer = elements[self.kind_of]
        self.elements = per_layer.sum() + self.last.weight_elements
        # Of weights whose gradients exist when the backward comes to a layer.
        self.done = self.last.weight_elements + (per_layer.sum() - np.cumsum(per_layer))

    def bytes(self, size: Size, tokens: Bytes | None = None) -> Bytes:
        tokens = self.tokens if tokens is None else tokens
        return size.at(tokens, self.keys) + np.zeros_like(tokens)

    def highest(self, mode: str, gradients: tuple[float, float, float]) -> tuple[Bytes, Any]:
        """The most that each kind of layer holds in ``mode``, and when, [num_kinds, batches]."""
        tokens = tuple(self.tokens.tolist())
        found = [highest_of(kind, mode, tokens, self.keys, gradients) for kind in self.kinds]
        most, at = (np.stack(each) for each in zip(*found, strict=True))
        return most, at


def highest_of(
    piece: Piece,
    mode: str,
    tokens: tuple[float, ...],
    keys: float,
    gradients: tuple[float, float, float],
) -> tuple[Bytes, Any]:
    """``Instants.highest`` of a pass over a piece, which is the same in many programs."""
    return _highest_of(
        piece, mode, tokens, keys, gradients if piece.weight_elements else NO_GRADIENTS
    )


@lru_cache(maxsize=4096)
def _highest_of(
    piece: Piece,
    mode: str,
    tokens: tuple[float, ...],
    keys: float,
    gradients: tuple[float, float, float],
) -> tuple[Bytes, Any]:
    instants: Instants = getattr(piece, mode)
    return instants.highest(np.array(tokens), keys, gradients)


@lru_cache(maxsize=256)
def passes_of(
    shape: ModelShape, setup: Setup, micro_batches: tuple[int, ...], sequence: int
) -> Passes:
    return Passes(shape, setup, micro_batches, sequence)


def shared_bytes(shape: ModelShape, setup: Setup, *, held: bool = False) -> Size:
    """What all layers share: rotary cos and sin, and the masks where something holds them;
    ``held``: during the forward. One that is handed over stays where fused attention keeps it."""
    tables = Size() if shape.rotary_per_kind else _tables(shape, setup)
    kinds = _num_kinds(shape)
    if shape.mask == "alibi":
        masks = float(shape.num_attention_heads * setup.itemsize)
    else:
        given = setup.masked and shape.mask == "given"
        stays = held or setup.recompute or shape.attention == "sdpa"
        masks = float(kinds * setup.itemsize) if given and stays else 0.0
    return total((tables, Size(0.0, masks), *[_of_a_kind(shape, setup, held)] * kinds))


def lone_bytes(shape: ModelShape, setup: Setup) -> Size:
    """What one of two kinds of layers shares: it goes with the lowest of them."""
    return _of_a_kind(shape, setup, held=False) if _num_kinds(shape) == 2 else Size()


def _num_kinds(shape: ModelShape) -> int:
    """Layers that slide and layers that do not."""
    return 2 if 0 < shape.num_sliding_layers < shape.num_layers else 1


def _tables(shape: ModelShape, setup: Setup) -> Size:
    itemsize = 4 if shape.wide_rotary else setup.itemsize
    channels = shape.rotary_dim // 2 if shape.paired_rotary else shape.rotary_dim
    return Size(2.0 * channels * itemsize if setup.backward else 0.0)


def _of_a_kind(shape: ModelShape, setup: Setup, held: bool) -> Size:
    """The model holds the masks that it makes in the forward, and a recomputation to its end."""
    tables = _tables(shape, setup) if shape.rotary_per_kind else Size()
    eager = shape.attention == "eager"
    builds = shape.mask == "positions" and (setup.masked or setup.window_masked or eager)
    kept = builds and (held or setup.recompute)
    return tables._replace(map=float(setup.itemsize if eager else 1) if kept else 0.0)
