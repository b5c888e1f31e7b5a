"""Which tensors a setting trains, by size: what gradients and optimizer states are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from thrifty.costs.adapted import FORMS
from thrifty.costs.blocks import Block, worst_turns
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting, takes_turns
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, eq=False)
class Trained:
    """Tensors that get a gradient."""

    matrices: Counter[tuple[int, int]]
    """(rows, columns) -> how many; the embedding and the head not among them."""
    embeddings: Counter[tuple[int, int]]
    """Of tokens and positions."""
    vector_elements: int
    """Of norms, biases and all else that is no matrix."""
    heads: Counter[tuple[int, int]] = field(default_factory=Counter)
    """The head, where it is not tied to the embedding."""
    fused_elements: int = 0
    """Of the largest tensor that holds a matrix of all experts of a layer."""

    @cached_property
    def num_elements(self) -> int:
        return self.vector_elements + sum(m * n * count for (m, n), count in self._all())

    @cached_property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        single = max((m * n for (m, n), _ in self._all()), default=self.vector_elements)
        return max(single, self.fused_elements)

    def _all(self) -> Iterable[tuple[tuple[int, int], int]]:
        return (*self.matrices.items(), *self.embeddings.items(), *self.heads.items())


NOTHING = Trained(Counter(), Counter(), 0)


def trained(shape: ModelShape, setting: MemorySetting) -> Trained:
    """At one step: of blocks that take turns the largest. Nothing under zeroth-order training,
    whose update needs no gradient."""
    if setting.zeroth_order:
        return NOTHING
    if blocks := takes_turns(setting):
        turns = (trained_at(shape, each) for each in worst_turns(shape, blocks))
        return max(turns, key=lambda found: found.num_elements)
    tied = shape.tie_word_embeddings and (setting.with_embedding or setting.with_head)
    return _trained(
        shape,
        setting.adapter,
        setting.only_layers,
        setting.with_embedding or tied,
        setting.with_head or tied,
        setting.only_head,
    )


def trained_at(shape: ModelShape, block: Block) -> Trained:
    """At the turn of one block."""
    tied = shape.tie_word_embeddings and (block.embedding or block.head)
    return _trained(shape, None, block.layers, block.embedding or tied, block.head or tied, False)


@lru_cache(maxsize=512)
def _trained(
    shape: ModelShape,
    adapter: Adapter | None,
    only_layers: frozenset[int] | None,
    with_embedding: bool,
    with_head: bool,
    only_head: bool,
) -> Trained:
    if adapter is not None:
        return _of_adapter(shape, adapter)
    head = (shape.vocab_size, shape.embedding_size)
    if only_head:
        return Trained(Counter(), Counter(), 0, Counter({head: 1}))
    layers = range(shape.num_layers) if only_layers is None else only_layers
    matrices, fused = Counter[tuple[int, int]](), 0
    for index in layers:
        matrices.update((each.in_features, each.out_features) for each in shape.linears_of(index))
        if shape.is_mixture(index) and shape.experts is not None:
            hidden, inner = shape.hidden_size, shape.experts.intermediate_size
            count = shape.experts.num_experts
            matrices[hidden, 2 * inner] += count
            matrices[inner, hidden] += count
            matrices[hidden, count] += 1
            fused = count * hidden * 2 * inner
    embeddings: Counter[tuple[int, int]] = Counter()
    heads: Counter[tuple[int, int]] = Counter()
    elements = sum(shape.layer_parameters(index) for index in layers)
    before = shape.parameters_by_part["embedding"]
    if only_layers is None or with_embedding:
        embeddings[head] += 1
        if shape.num_positions:
            embeddings[shape.num_positions, shape.hidden_size] += 1
        elements += before
    if only_layers is None or with_head:
        if not shape.tie_word_embeddings:
            heads[head] += 1
        in_layers = sum(map(shape.layer_parameters, range(shape.num_layers)))
        elements += shape.num_parameters - in_layers - before
    found = (matrices, embeddings, heads)
    in_matrices = sum(m * n * count for sizes in found for (m, n), count in sizes.items())
    return Trained(matrices, embeddings, elements - in_matrices, heads, fused)


def _of_adapter(shape: ModelShape, adapter: Adapter) -> Trained:
    form, matrices, elements = FORMS[adapter.form], Counter[tuple[int, int]](), 0
    for linear in adapter.linears(shape):
        matrices.update(form.matrices(shape, linear, adapter.rank))
        elements += form.vector(shape, linear, adapter.rank)
    return Trained(matrices, Counter(), elements)
