"""What all layers of a pass share: the rotary embedding's cosines and sines, and the masks.

A mask that the caller hands over is alive throughout; one that the model makes is held during the
forward, and under recomputation to the end of the backward.
"""

from __future__ import annotations

from thrifty.costs.layer import Setup
from thrifty.costs.operations import Size
from thrifty.costs.shape import ModelShape


def shared(shape: ModelShape, setup: Setup, *, held: bool = False) -> Size:
    """``held``: during the forward."""
    kinds = 2 if 0 < shape.num_sliding_layers < shape.num_layers else 1
    tables = kinds if shape.rotary_per_kind else 1
    itemsize = 4 if shape.wide_rotary else setup.itemsize
    channels = shape.rotary_dim // 2 if shape.paired_rotary else shape.rotary_dim
    token = tables * 2.0 * channels * itemsize if setup.backward else 0.0
    return Size(token, _masks(shape, setup, kinds, held))


def _masks(shape: ModelShape, setup: Setup, kinds: int, held: bool) -> float:
    """Bytes of a token and key."""
    if shape.mask == "alibi":
        return float(shape.num_attention_heads * setup.itemsize)
    if setup.masked and shape.mask != "positions":
        return float(kinds * setup.itemsize)
    eager = shape.attention == "eager"
    builds = setup.masked or setup.window_masked or eager or shape.mask == "always"
    if not (builds and (held or setup.recompute)):
        return 0.0
    return float(kinds * (setup.itemsize if eager else 1))
