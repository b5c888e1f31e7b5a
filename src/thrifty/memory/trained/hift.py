"""Another group of layers at every step, its states on the host while it waits (HiFT).

The embedding and the head are groups of their own, one where they are tied. The order is that of
the first cycle throughout; the learning rate stays the same within a cycle, so that every group
gets the same. Where there is no device beside the host, no states are saved, gradients alone.
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
class HiFT(Blockwise):
    """Another group of layers at every step, its states on the host while it waits."""

    makes = "fit"
    searched = False
    runs = True
    source = "arXiv:2401.15207"
    worth = Worth(0.6, 0.2, "a judgement: a group moves once a cycle; arXiv:2401.15207")

    group_layers: int = 1
    order: Literal["ascending", "descending", "random"] = "ascending"

    def __post_init__(self) -> None:
        check_ranges(self, group_layers=(1, inf))

    @property
    def blocks(self) -> Blocks:
        return Blocks(layers=self.group_layers, ends="turns", parked=True)

    def block_at(self, step: int, num_layers: int, tied: bool, seed: int) -> Block:
        cycle = list(self.blocks.cycle(num_layers, tied))
        if self.order == "random":
            Random(seed).shuffle(cycle)
        turn = step % len(cycle)
        return cycle[-1 - turn if self.order == "descending" else turn]

    def cycle_steps(self, shape: ModelShape) -> int:
        return len(self.blocks.cycle(shape.num_layers, shape.tie_word_embeddings))

    def schedule_step(self, step: int, shape: ModelShape) -> int:
        return step - step % self.cycle_steps(shape)
