"""Which linears few bits hold, and which models have some that they cannot."""

from __future__ import annotations

from thrifty.costs.shape import LinearShape, ModelShape

BLOCK = 64
"""Weights that share a scale in 4 bits."""


def refuses_block(shape: ModelShape, what: str) -> str | None:
    """Why linears of this shape cannot be stored in blocks. Where rows are no whole number of
    blocks, some CPUs (AVX-512) make other weights of them than were stored, without a word; where
    they are no multiple of 32 they cannot evaluate."""
    linears = stored_linears(shape)
    cut = next((each for each in linears if each.in_features % BLOCK), None)
    if cut is not None:
        return (
            f"{what} holds rows in blocks of {BLOCK} and {cut.name} has rows of "
            f"{cut.in_features}: some CPUs then read other weights than were stored"
        )
    odd = next((each for each in linears if each.out_features % 32), None)
    if odd is not None:
        return (
            f"{what} needs a multiple of 32 rows and {odd.name} has {odd.out_features}: some CPUs "
            "then cannot evaluate"
        )
    return None


def stored_linears(shape: ModelShape) -> list[LinearShape]:
    """Those that few bits hold; not a gate of a single row."""
    found = [linear for index in range(shape.num_layers) for linear in shape.linears_of(index)]
    return [linear for linear in dict.fromkeys(found) if linear.out_features > 1]
