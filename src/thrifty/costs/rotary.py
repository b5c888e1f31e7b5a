"""The rotary embedding of queries and keys; its cosines and sines are shared by all layers."""

from __future__ import annotations

from thrifty.costs.operations import Program, Size, Tensor


def rotate(p: Program, x: Tensor, size: Size) -> Tensor:
    """x cos + rotate_half(x) sin, or a product of complex numbers."""
    packs = "before" if x.grad else ""
    if p.shape.wide_rotary and p.shape.paired_rotary:  # as complex numbers
        x = p.cast(x, p.itemsize, 4)
        return p.cast(p.emit("rotate_complex", (x,), x.size, packs=packs), 4, p.itemsize)
    passes = (5.0, 9.0)  # products, slices, a negation, a concatenation, a sum
    return p.emit("rotate", (x,), size, packs=packs, passes=passes)
