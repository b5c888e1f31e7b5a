"""A few random layers at a time beside the embedding and the head (LISA).

The layers are drawn anew every ``switch_steps``, each as likely as any other; the embedding, the
final norm and the head are always trained. States of layers that are left are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random
from typing import TYPE_CHECKING

from thrifty.core.contracts import Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.blocks import Block, Blocks
from thrifty.holding.blockwise import Blockwise

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class LISA(Blockwise):
    """A few random layers at a time beside the embedding and the head."""

    makes = "fit"
    searched = False
    runs = True
    source = "arXiv:2403.17919"
    worth = Worth(0.65, 0.2, "a judgement: few weights move at a time; arXiv:2403.17919")

    layers: int = 2
    switch_steps: int = 20

    def __post_init__(self) -> None:
        check_ranges(self, layers=(1, inf), switch_steps=(1, inf))

    @property
    def blocks(self) -> Blocks:
        return Blocks(layers=self.layers, ends="trained", drawn=True)

    def cycle_steps(self, shape: ModelShape) -> int:
        """Of one draw: there is no round to come to the end of."""
        return self.switch_steps

    def block_at(self, step: int, num_layers: int, tied: bool, seed: int) -> Block:
        draw = Random(f"{seed} {step // self.switch_steps}")
        return Block(frozenset(draw.sample(range(num_layers), self.layers)), True, True)
