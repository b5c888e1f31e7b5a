"""Blockwise training: the parts of a model that take turns in being trained.

What a step takes differs by turn. Its mean over a cycle is worked out from few of them: from one
turn to the next of equal layers the same work is added, so that the first and the last of such a
run tell the mean of all. Its peak is that of the lowest turn (the backward goes through all
layers), of the highest (under recomputation), or of the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

from thrifty.costs.shape import ModelShape


class Block(NamedTuple):
    """What is trained at one turn."""

    layers: frozenset[int] = frozenset()
    embedding: bool = False
    """With all else that comes before the layers."""
    head: bool = False
    """With the final norm."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a model is divided into them."""

    layers: int
    """Of a block."""
    ends: Literal["frozen", "trained", "turns"] = "frozen"
    """The embedding and the head: never trained, always, or in turns of their own; tied ones have
    theirs together."""
    drawn: bool = False
    """The layers of a block are drawn at random; else they follow each other."""
    parked: bool = False
    """Optimizer states of a block that is left wait on the host; else they are dropped."""

    def cycle(self, num_layers: int, tied: bool) -> tuple[Block, ...]:
        """A turn each, from the bottom up; of drawn layers turns in which each comes as often."""
        whole = range(num_layers)
        if self.drawn:
            of_layers = [{(at + i) % num_layers for i in range(self.layers)} for at in whole]
        else:
            starts = whole[:: self.layers]
            of_layers = [set(whole[start : start + self.layers]) for start in starts]
        always = self.ends == "trained"
        turns = [Block(frozenset(layers), always, always) for layers in of_layers]
        if self.ends == "turns" and tied:
            return (Block(embedding=True, head=True), *turns)
        if self.ends == "turns":
            return (Block(embedding=True), *turns, Block(head=True))
        return tuple(turns)


@lru_cache(maxsize=256)
def mean_turns(shape: ModelShape, blocks: Blocks) -> tuple[tuple[Block, float], ...]:
    """Turns and their weights, whose weighed work is the mean of a cycle's."""

    def alike(block: Block) -> tuple[int, int, bool, bool]:
        mixtures = sum(shape.is_mixture(index) for index in block.layers)
        return len(block.layers), mixtures, block.embedding, block.head

    cycle = blocks.cycle(shape.num_layers, shape.tie_word_embeddings)
    runs = [list(run) for _, run in groupby(cycle, alike)]
    return tuple((end, len(run) / 2 / len(cycle)) for run in runs for end in (run[0], run[-1]))


@lru_cache(maxsize=256)
def worst_turns(shape: ModelShape, blocks: Blocks) -> tuple[Block, ...]:
    """Those of a cycle among which the one is that holds most: of layers the lowest, and of the
    largest the highest; the ends."""
    cycle = blocks.cycle(shape.num_layers, shape.tie_word_embeddings)
    of_layers = [block for block in cycle if block.layers]
    ends = [block for block in cycle if not block.layers]

    def size_and_height(block: Block) -> tuple[int, int]:
        return sum(map(shape.layer_parameters, block.layers)), sum(block.layers)

    largest = max(of_layers, key=size_and_height)
    return tuple(dict.fromkeys((of_layers[0], largest, *ends)))
