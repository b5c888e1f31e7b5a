"""Bytes that are held whatever the batch: weights, optimizer states, caches, files."""

from __future__ import annotations

from functools import lru_cache

from thrifty.costs.adapted import FORMS
from thrifty.costs.blocks import worst_turns
from thrifty.costs.setting import ADAMW, MemorySetting, States, Storage, takes_turns
from thrifty.costs.shape import ITEMSIZE, ModelShape
from thrifty.costs.trained import Trained, trained, trained_at


def weight_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of the model's own weights as they lie in memory, and of a frozen copy that is asked too."""
    copies = 2 if setting.reference and setting.adapter is None else 1
    whole = copies * _weight_bytes(shape, setting.itemsize, setting.storage)
    if setting.layers_on_host:
        layers = _layer_parameters(shape)
        whole -= float((sum(layers) - max(layers)) * setting.itemsize)
    return whole


def fetched_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """That come from the host for a micro-batch: of each layer for its forward and its backward,
    but that the last and the first stay from the one pass to the other."""
    if not setting.layers_on_host:
        return 0.0
    layers = _layer_parameters(shape)
    return float((sum(layers[1:]) + sum(layers[:-1])) * setting.itemsize)


@lru_cache(maxsize=64)
def _layer_parameters(shape: ModelShape) -> tuple[int, ...]:
    return tuple(map(shape.layer_parameters, range(shape.num_layers)))


@lru_cache(maxsize=512)
def _weight_bytes(shape: ModelShape, itemsize: int, storage: Storage | None) -> float:
    whole = float(shape.num_parameters * itemsize)
    if storage is None:
        return whole
    for index in range(shape.num_layers):
        for linear in shape.linears_of(index):
            whole -= linear.in_features * linear.out_features * itemsize
            whole += storage.bytes_of(linear)
    return whole


def state_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of the optimizer's states: of blocks that take turns those of the largest, or of all where
    the host on which they wait is the device."""
    return max(state_bytes_of(shape, each, setting) for each in turns_of(shape, setting))


def turns_of(shape: ModelShape, setting: MemorySetting) -> tuple[Trained, ...]:
    """What is trained at each of the turns among which the worst is; one where none are taken."""
    if blocks := takes_turns(setting):
        return tuple(trained_at(shape, each) for each in worst_turns(shape, blocks))
    return (trained(shape, setting),)


def state_bytes_of(shape: ModelShape, found: Trained, setting: MemorySetting) -> float:
    """Of the optimizer's states where ``found`` is what a step trains."""
    blocks = setting.blocks
    if blocks and blocks.parked and setting.device_kind == "cpu":
        return parked_bytes(shape, setting)
    itemsize, averages = setting.trained_itemsize, 0.0
    if setting.adapter is not None:
        averages = FORMS[setting.adapter.form].averages * found.num_elements * itemsize
    return _state_bytes(found, setting.states, itemsize) + averages


def parked_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of the states of all blocks, on the device or waiting on the host."""
    blocks = setting.blocks
    assert blocks is not None
    assert not blocks.drawn
    cycle = blocks.cycle(shape.num_layers, shape.tie_word_embeddings)
    turns = (trained_at(shape, each) for each in cycle)
    return sum(_state_bytes(each, setting.states, setting.trained_itemsize) for each in turns)


@lru_cache(maxsize=1024)
def _state_bytes(found: Trained, states: States, itemsize: int) -> float:
    size = states.vector_bytes(found.vector_elements, itemsize)
    for (rows, columns), count in found.matrices.items():
        size += count * states.matrix_bytes(rows, columns, itemsize)
    for (rows, columns), count in found.embeddings.items():
        if states.wide_embedding:
            size += count * rows * columns * states.wide_embedding
        else:
            size += count * states.table_bytes(rows, columns, itemsize)
    for (rows, columns), count in found.heads.items():
        size += count * states.table_bytes(rows, columns, itemsize)
    return size


@lru_cache(maxsize=64)
def largest_tensor(shape: ModelShape) -> int:
    """Elements of the largest weight in a layer."""
    largest = max(
        linear.in_features * linear.out_features
        for index in range(shape.num_layers)
        for linear in shape.linears_of(index)
    )
    if shape.experts is not None:
        one = 2 * shape.hidden_size * shape.experts.intermediate_size
        largest = max(largest, shape.experts.num_experts * one)
    return largest


UNFUSED_ADAMW = {
    "cuda": States(name="adamw", relative=2.0, step_all=1.0),
    "cpu": States(name="adamw", relative=2.0, step_largest=2.0),
}
"""``foreach`` on CUDA makes a copy of everything, the loop on a CPU two of the largest tensor."""


def step_bytes(setting: MemorySetting) -> float:
    """Of an element of the tensor at work, what an optimizer's step allocates for it."""
    states = setting.states
    if states is ADAMW and not setting.fused and setting.device_kind == "cpu":
        return UNFUSED_ADAMW["cpu"].step_largest * setting.trained_itemsize
    narrow = setting.trained_itemsize < 4
    if states.step_cpu and setting.device_kind == "cpu":
        return states.step_cpu + (4.0 * states.step_cpu_casts if narrow else 0.0)
    return states.step_largest + (4.0 * states.step_casts if narrow else 0.0)


def update_bytes(shape: ModelShape, setting: MemorySetting) -> tuple[float, float]:
    """While the optimizer steps: the gradients, and what the step allocates. Nothing where the
    backward has used up all of them."""
    return update_bytes_of(trained(shape, setting), setting)


def update_bytes_of(found: Trained, setting: MemorySetting) -> tuple[float, float]:
    """The same where ``found`` is what the step trains."""
    if setting.in_backward:
        return 0.0, 0.0
    states, itemsize = setting.states, setting.trained_itemsize
    gradients = found.num_elements * itemsize / setting.trained_shards
    if states is ADAMW and not setting.fused:
        states = UNFUSED_ADAMW[setting.device_kind]
    largest = float(found.largest)
    allocated = states.step_all * gradients + step_bytes(setting) * largest
    return gradients, allocated


def num_trained(shape: ModelShape, setting: MemorySetting) -> int:
    """Elements that get a gradient."""
    return trained(shape, setting).num_elements


def kv_cache_bytes(shape: ModelShape, batch: int, context: int, dtype: str) -> float:
    """Keys and values of ``context`` tokens in every layer, or the latents that they are expanded
    from; windows hold at most their length."""
    window = min(context, shape.sliding_window) if shape.sliding_window else context
    full = shape.num_layers - shape.num_sliding_layers
    held = full * context + shape.num_sliding_layers * window
    return float(batch * held * shape.cached_size * ITEMSIZE[dtype])


def checkpoint_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Bytes on disk of a checkpoint to resume from: what is trained, and its optimizer states.

    An adapter is saved alone, weights that are trained with all others.
    """
    parked = setting.blocks is not None and setting.blocks.parked
    states = (parked_bytes if parked else state_bytes)(shape, setting)
    saved = shape.num_parameters if setting.adapter is None else num_trained(shape, setting)
    return saved * setting.trained_itemsize + states
