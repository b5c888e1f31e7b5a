"""Adam on one block of layers at a time, its states dropped when it is left (BAdam).

Whatever the optimizer, in fact. Embedding, final norm and head are frozen, as in the authors' code.
The blocks come from the bottom up, from the top down, or in a new random order each cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random
from typing import TYPE_CHECKING, Literal

from thrifty.core.contracts import Worth
from thrifty.core.ranges import check_ranges
from thrifty.costs.blocks import Block, Blocks
from thrifty.holding.blockwise import Blockwise

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class BAdam(Blockwise):
    """Adam on one block of layers at a time, its states dropped when it is left."""

    makes = "fit"
    runs = True
    source = "arXiv:2404.02827"
    worth = Worth(0.6, 0.2, "a judgement: few weights move at a time; arXiv:2404.02827")

    block_layers: int = 1
    switch_steps: int = 100
    """Of a block's turn."""
    order: Literal["random", "ascending", "descending"] = "random"

    def __post_init__(self) -> None:
        check_ranges(self, block_layers=(1, inf), switch_steps=(1, inf))

    @property
    def blocks(self) -> Blocks:
        return Blocks(layers=self.block_layers)

    def block_at(self, step: int, num_layers: int, tied: bool, seed: int) -> Block:
        cycle = list(self.blocks.cycle(num_layers, tied))
        number, turn = divmod(step // self.switch_steps, len(cycle))
        if self.order == "random":
            Random(f"{seed} {number}").shuffle(cycle)
        return cycle[-1 - turn if self.order == "descending" else turn]

    def cycle_steps(self, shape: ModelShape) -> int:
        cycle = self.blocks.cycle(shape.num_layers, shape.tie_word_embeddings)
        return len(cycle) * self.switch_steps
