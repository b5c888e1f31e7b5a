"""Which tensors a setting trains, by size: what gradients and optimizer states are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, eq=False)
class Trained:
    """Tensors that get a gradient."""

    matrices: Counter[tuple[int, int]]
    """(rows, columns) -> how many; the embedding and the head not among them."""
    embeddings: Counter[tuple[int, int]]
    vector_elements: int
    """Of norms, biases and all else that is no matrix."""

    @cached_property
    def num_elements(self) -> int:
        return self.vector_elements + sum(m * n * count for (m, n), count in self._all())

    @cached_property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((m * n for (m, n), _ in self._all()), default=self.vector_elements)

    def _all(self) -> Iterable[tuple[tuple[int, int], int]]:
        return (*self.matrices.items(), *self.embeddings.items())


NOTHING = Trained(Counter(), Counter(), 0)


def trained(shape: ModelShape, setting: MemorySetting) -> Trained:
    """Nothing under zeroth-order training, whose update needs no gradient."""
    if setting.zeroth_order:
        return NOTHING
    return _trained(shape, setting.adapter, setting.only_layers, setting.only_head)


@lru_cache(maxsize=512)
def _trained(
    shape: ModelShape,
    adapter: Adapter | None,
    only_layers: frozenset[int] | None,
    only_head: bool,
) -> Trained:
    if adapter is not None:
        return Trained(_adapter_matrices(shape, adapter), Counter(), 0)
    head = (shape.vocab_size, shape.embedding_size)
    if only_head:
        return Trained(Counter(), Counter({head: 1}), 0)
    layers = range(shape.num_layers) if only_layers is None else only_layers
    matrices: Counter[tuple[int, int]] = Counter()
    for index in layers:
        matrices.update((each.in_features, each.out_features) for each in shape.linears_of(index))
        if shape.is_mixture(index) and shape.experts is not None:
            hidden, inner = shape.hidden_size, shape.experts.intermediate_size
            count = shape.experts.num_experts
            matrices[hidden, 2 * inner] += count
            matrices[inner, hidden] += count
            matrices[hidden, count] += 1
    embeddings: Counter[tuple[int, int]] = Counter()
    if only_layers is None:
        embeddings[head] = 1 if shape.tie_word_embeddings else 2
        if shape.num_positions:
            embeddings[shape.num_positions, shape.hidden_size] += 1
    elements = (
        shape.num_parameters
        if only_layers is None
        else sum(shape.layer_parameters(index) for index in only_layers)
    )
    in_matrices = sum(m * n * c for sizes in (matrices, embeddings) for (m, n), c in sizes.items())
    return Trained(matrices, embeddings, elements - in_matrices)


def _adapter_matrices(shape: ModelShape, adapter: Adapter) -> Counter[tuple[int, int]]:
    adapter.check(shape)
    layers = range(shape.num_layers) if adapter.layers is None else set(adapter.layers)
    matrices: Counter[tuple[int, int]] = Counter()
    for index in layers:
        for linear in shape.linears_of(index):
            if adapter.adapts(shape, linear):
                matrices[linear.in_features, adapter.rank] += 1
                matrices[adapter.rank, linear.out_features] += 1
    return matrices
