"""Seconds of a training step or a forward pass: a roofline by kind of work, then joules.

    t = a * sum over products of FLOPs / rate(smallest dimension)      matrix products
      + b * bytes through memory / bandwidth                           norms, activations, loss
      + c * number of kernels * launch time                            what rules small models
      + d * bytes of weights, gradients and moments / bandwidth        the optimizer

The work is read off the operations that a step executes (``layer.py``), so that recomputation,
adapters, masks and a large vocabulary cost what they cost. Rates, bandwidth and launch time are the
device's; a, b, c, d were fitted to real steps by `thrifty device` (1 for a device from the table,
whose rates are its peaks times an efficiency that grows with the smallest dimension: 0.55 from
2,048 on). On a CPU an exponential counts as the memory traffic that takes as long, and a buffer
above glibc's mmap threshold pays for its page faults each time it is allocated, activations beyond
its trim threshold once a step.

Transfers over links come on top: offloaded activations and states, shards. Limits: products, memory
traffic and transfers do not overlap; no data loading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from thrifty.costs.blocks import mean_turns
from thrifty.costs.hardware import Device
from thrifty.costs.held import fetched_bytes, state_bytes_of
from thrifty.costs.layer import Setup, embedding, head, layers
from thrifty.costs.memory import (
    MemorySetting,
    num_trained,
    saved_bytes,
    setup_of,
    weight_bytes,
)
from thrifty.costs.operations import Operation, Operations, Product, Size, recomputed, total
from thrifty.costs.setting import at_turn, parts_of, takes_turns
from thrifty.costs.shape import ModelShape
from thrifty.costs.trained import Trained, trained

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGE_EFFICIENCY = 0.55
"""Share of the peak that large matrix products of real training reach (MFU of well-run jobs)."""
_LARGE = 2048
ATTENTION_EFFICIENCY = 0.55
"""Of fused attention beside a matrix product of its head size, where it was not measured."""
UNPACKING = 6.0
"""A weight made whole for a use, in times that its bytes go through memory. Calibrated: LoRA on
a 7B model in 4 bits then takes 1.3 to 1.6 times as long as in bf16, as in litgpt's tables."""
HOST_BYTES_PER_SECOND = 5e10
"""Memory bandwidth of a host that steps an offloaded optimizer."""
CPU_DRAW_BYTES = 160.0
"""What goes through memory while a core draws a normal number: 4.4 ns at 36 GB/s, measured. A GPU
draws as fast as it writes."""
CAUSAL_BLOCK = 256
"""Keys that a causal kernel handles at once; beyond it, it skips those to come."""

SECONDS_MARGIN = 1.25
"""How much slower than predicted, or than it lately was, anything may turn out: what is reserved
for it over what it should take."""

PASSES = ("forward", "input", "weight")
"""What a matrix product is of: the forward, the gradient of what a linear reads, its weight's."""

CPU_PASSES: dict[str, tuple[float, float]] = {
    "silu": (4.0, 5.0),
    "gelu": (4.5, 5.0),
    "gelu_pytorch_tanh": (6.0, 6.0),
    "gelu_new": (2.5, 1.0),
    "tanh": (13.0, 2.0),
    "log_softmax": (3.0, 3.0),
    "softmax": (3.0, 3.0),
    "layer_norm": (5.0, 2.0),
    "noise": (40.0, 0.0),
}
"""Time of these kernels, forward and backward, in copies of their tensors; measured on AVX2."""
MMAP_THRESHOLD = 32 * 2**20
"""glibc's largest: a CPU buffer above it gets new pages every time it is allocated."""
TRIM_THRESHOLD = 2 * MMAP_THRESHOLD
"""What glibc keeps of freed memory: activations beyond it get new pages every step."""


def step_seconds(
    shape: ModelShape,
    setting: MemorySetting,
    device: Device,
    kind: Literal["train", "forward"] = "train",
) -> float:
    """One micro-batch: forward, backward and the optimizer's step, or a forward pass."""
    return float(seconds_at(shape, setting, device, (setting.micro_batch,), kind)[0])


def seconds_at(
    shape: ModelShape,
    setting: MemorySetting,
    device: Device,
    micro_batches: Sequence[int],
    kind: Literal["train", "forward"] = "train",
) -> NDArray[np.float64]:
    """``step_seconds`` at each micro-batch."""
    if kind == "train":
        return seconds_by_optimizer(shape, [setting], device, micro_batches)[0]
    terms = _terms(shape, setting, device, tuple(micro_batches), kind)
    fitted: Any = sum(f * term for f, term in zip(_factors(device, setting), terms, strict=True))
    return fitted


def seconds_by_optimizer(
    shape: ModelShape,
    settings: Sequence[MemorySetting],
    device: Device,
    micro_batches: Sequence[int],
) -> NDArray[np.float64]:
    """``step_seconds`` of settings that differ in their optimizer alone, [settings, batches]. Of
    blocks that take turns, the mean over a cycle."""
    batches, first = tuple(micro_batches), settings[0]
    if first.short:
        parts = zip(*map(parts_of, settings), strict=True)
        each = [seconds_by_optimizer(shape, part, device, batches) for part in parts]
        summed: NDArray[np.float64] = np.sum(each, axis=0)
        return summed
    if blocks := takes_turns(first):
        seconds = np.zeros((len(settings), len(batches)))
        for block, weight in mean_turns(shape, blocks):
            turn = at_turn(first, block)
            seconds += weight * _seconds_of(shape, turn, settings, device, batches)
        return seconds
    return _seconds_of(shape, first, settings, device, batches)


def _seconds_of(
    shape: ModelShape,
    first: MemorySetting,
    settings: Sequence[MemorySetting],
    device: Device,
    batches: tuple[int, ...],
) -> NDArray[np.float64]:
    """The passes of ``first``, with the updates of all: what it trains is what each does."""
    found = trained(shape, first)
    *factors, of_update = _factors(device, first)
    *passes, _ = _terms(shape, first, device, batches, "train")
    if first.reference:
        *more, _ = _terms(shape, first, device, batches, "forward")
        passes = [one + other for one, other in zip(passes, more, strict=True)]
    fitted: Any = sum(factor * term for factor, term in zip(factors, passes, strict=True))
    if device.kind == "cpu":  # whose cores the ranks share
        fitted = fitted * first.num_ranks
    fitted = fitted + _transfers(shape, first, device, batches)
    updates = [
        of_update * _optimizer_seconds(shape, setting, device, found)
        + _offloaded_seconds(setting, device, found)
        + _parked_seconds(shape, setting, device, found)
        for setting in settings
    ]
    return fitted + np.array(updates)[:, None]


def _factors(device: Device, setting: MemorySetting) -> tuple[float, float, float, float]:
    return device.factors.get(setting.dtype, (1.0, 1.0, 1.0, 1.0))


def forward_seconds(
    shape: ModelShape, batch: float, sequence: int, dtype: str, device: Device
) -> float:
    """A forward pass over ``[batch, sequence]`` with logits and loss; ``batch`` may be a mean."""
    whole = max(1, round(batch))
    setting = MemorySetting(
        micro_batch=whole, sequence=sequence, dtype=dtype, masked=False, device_kind=device.kind
    )
    return step_seconds(shape, setting, device, "forward") * max(batch / whole, 1e-9)


def step_terms(
    shape: ModelShape, setting: MemorySetting, device: Device, kind: Literal["train", "forward"]
) -> tuple[float, float, float, float]:
    """Seconds of the four terms before their factors."""
    a, b, c, d = _terms(shape, setting, device, (setting.micro_batch,), kind)
    return float(a[0]), float(b[0]), float(c[0]), float(d[0])


def _terms(
    shape: ModelShape,
    setting: MemorySetting,
    device: Device,
    micro_batches: tuple[int, ...],
    kind: Literal["train", "forward"],
) -> tuple[NDArray[np.float64], ...]:
    """The four terms at each micro-batch."""
    train = kind == "train"
    work, columns = _work(
        shape,
        setup_of(shape, setting, backward=train),
        int(setting.recompute) if train else 0,
        setting.selective,
        train and setting.loss_chunk > 0 and not setting.loss_fused,
    )
    sequence = setting.sequence
    tokens = np.array(micro_batches, dtype=float) * sequence
    keys = sequence if setting.masked else min(sequence, (sequence + CAUSAL_BLOCK) / 2)
    products = _product_seconds(columns, tokens, keys, setting.dtype, device)
    memory = (work.moved.at(tokens, sequence) + work.moved_weights) / device.bytes_per_second
    if device.kind == "cpu":
        memory = memory + device.fault_seconds * _fresh_bytes(shape, setting, work, tokens, train)
    twice = 2.0 if train and setting.zeroth_order else 1.0
    kernels = np.full_like(tokens, work.kernels * device.operation_seconds)
    return (
        twice * products,
        twice * memory,
        twice * kernels,
        np.full_like(
            tokens,
            _optimizer_seconds(shape, setting, device, trained(shape, setting)) if train else 0.0,
        ),
    )


def _fresh_bytes(
    shape: ModelShape,
    setting: MemorySetting,
    work: Work,
    tokens: NDArray[np.float64],
    train: bool,
) -> NDArray[np.float64]:
    """New pages that a CPU touches: buffers above the mmap threshold, activations that are too many
    to be kept between steps."""
    fresh = np.zeros_like(tokens)
    sizes = [(size.at(tokens, setting.sequence), n) for size, n in work.written.items()]
    for size, times in (*sizes, *work.gradients.items()):
        fresh += np.where(size > MMAP_THRESHOLD, size, 0.0) * times
    if train:
        rows = tuple((tokens / setting.sequence).astype(int).tolist())
        kept = saved_bytes(shape, setting, rows)
        fresh += np.maximum(0.0, kept - TRIM_THRESHOLD)
    return fresh


def _optimizer_seconds(
    shape: ModelShape, setting: MemorySetting, device: Device, found: Trained
) -> float:
    """The weights, gradients and states go through memory some times."""
    rate = device.bytes_per_second
    if setting.zeroth_order:  # a moved copy for each of two losses, then the update
        moved = 8.0 * weight_bytes(shape, setting)
        drawn = 3 * shape.num_parameters * CPU_DRAW_BYTES if device.kind == "cpu" else 0.0
        return (moved + drawn) / rate
    size = found.num_elements * setting.trained_itemsize
    times = setting.states.moved
    if device.kind == "cpu":
        times *= setting.states.cpu_factor
    if setting.states_offloaded:
        rate = HOST_BYTES_PER_SECOND
    return times * size / setting.trained_shards / rate


def _transfers(
    shape: ModelShape, setting: MemorySetting, device: Device, micro_batches: tuple[int, ...]
) -> NDArray[np.float64]:
    """Seconds on the links, nothing of which is taken to overlap: offloaded activations down and up
    again, layers from the host, shards gathered twice and gradients scattered once, those of
    replicas added up in a ring."""
    tokens = np.array(micro_batches, dtype=float)
    seconds = np.zeros_like(tokens)
    if setting.offload:
        kept = setting.changed(offload=False)
        there = saved_bytes(shape, kept, micro_batches, head=False)
        seconds += 2.0 * there / device.host_bytes_per_second
    if setting.num_devices > 1:
        share = (setting.num_devices - 1) / setting.num_devices
        gathered = 2.0 * weight_bytes(shape, setting)
        gathered += num_trained(shape, setting) * setting.trained_itemsize
        seconds += share * gathered / device.peer_bytes_per_second
    if setting.replicas > 1:
        share = (setting.replicas - 1) / setting.replicas
        gradients = num_trained(shape, setting) * setting.trained_itemsize
        seconds += 2.0 * share * gradients / device.peer_bytes_per_second
    return seconds + fetched_bytes(shape, setting) / device.host_bytes_per_second


def _offloaded_seconds(setting: MemorySetting, device: Device, found: Trained) -> float:
    """Gradients and weights down to the moments on the host, and weights up again."""
    if not setting.states_offloaded:
        return 0.0
    size = found.num_elements * setting.trained_itemsize / setting.trained_shards
    return 3.0 * size / device.host_bytes_per_second


def _parked_seconds(
    shape: ModelShape, setting: MemorySetting, device: Device, found: Trained
) -> float:
    """A block's states up from the host for its turn of one step, and down again after it."""
    if not (setting.blocks and setting.blocks.parked) or device.kind == "cpu":
        return 0.0
    return 2.0 * state_bytes_of(shape, found, setting) / device.host_bytes_per_second


class Work(NamedTuple):
    """What a step does, independent of its tokens."""

    products: Counter[tuple[Product, str]]
    """Each with which of ``PASSES`` it is of."""
    moved: Size
    """Read and written by elementwise kernels."""
    moved_weights: float
    written: Counter[Size]
    """Buffers allocated."""
    gradients: Counter[float]
    """Weight gradients allocated, bytes of each."""
    kernels: float


@lru_cache(maxsize=1024)
def _work(
    shape: ModelShape,
    setup: Setup,
    recompute: int = 0,
    selective: bool = False,
    chunked: bool = False,
) -> tuple[Work, NDArray[np.float64]]:
    """Also its products as columns, to be timed together."""
    body, top = tuple(layers(shape, setup)), head(shape, setup)
    pieces = Counter((embedding(shape, setup), top, *body))
    done = [(_once(each, setup.itemsize, setup.on_cpu), n) for each, n in pieces.items()]
    for each, times in Counter(body[::recompute] if recompute else ()).items():
        done.append((_again(each, setup.itemsize, setup.on_cpu, selective), times))
    if chunked:  # a chunk's logits are made again for its backward
        done.append((_again(top, setup.itemsize, setup.on_cpu, False), 1))
    products: Counter[tuple[Product, str]] = Counter()
    written: Counter[Size] = Counter()
    gradients: Counter[float] = Counter()
    moved: list[Size] = []
    weights = kernels = 0.0
    for work, times in done:
        for one, number in work.products.items():
            products[one] += times * number
        for size, number in work.written.items():
            written[size] += times * number
        for gradient, number in work.gradients.items():
            gradients[gradient] += times * number
        moved.append(work.moved.times(times))
        weights += times * work.moved_weights
        kernels += times * work.kernels
    work = Work(products, total(moved), weights, written, gradients, kernels)
    kinds = dict.fromkeys(product for product, _ in products)
    rows = [(*each, *(products[each, name] for name in PASSES)) for each in kinds]
    return work, np.array(rows, dtype=float)


@lru_cache(maxsize=2048)
def _once(operations: Operations, itemsize: int, on_cpu: bool) -> Work:
    """A piece's forward and its backward."""
    sliced = [each for each in operations if each.inside]
    run = [each for each in operations if each.kind != "hold"]
    run += [inner for each in sliced for inner in each.inside if inner.kind != "hold"]
    both = [(each, False) for each in run] + [(each, True) for each in run if each.writes.grad]
    for each in sliced:
        again = recomputed(each.inside) if each.writes.grad else ()
        both += [(inner, False) for inner in again if inner.kind != "hold"]
    return _of_kernels(both, itemsize, on_cpu)


@lru_cache(maxsize=2048)
def _again(operations: Operations, itemsize: int, on_cpu: bool, selective: bool) -> Work:
    """Its second forward; ``selective``: what its products put out was kept."""
    run = [each for each in recomputed(operations) if each.kind != "hold"]
    left = [(each, False) for each in run if not (selective and each.forward)]
    return _of_kernels(left, itemsize, on_cpu)


def _of_kernels(kernels: Iterable[tuple[Operation, bool]], itemsize: int, on_cpu: bool) -> Work:
    """Of operations, each with whether it is its backward."""
    products: Counter[tuple[Product, str]] = Counter()
    written: Counter[Size] = Counter()
    gradients: Counter[float] = Counter()
    token = keyed = fixed = count = weights = 0.0
    for operation, backward in kernels:
        done = operation.backward if backward else operation.forward
        if operation.inside:  # whose operations are there themselves
            done = ()
        products.update(zip(done, _passes_of(operation, backward), strict=False))
        passes = operation.passes[backward]
        count += passes + len(done)
        if on_cpu:
            passes *= CPU_PASSES.get(operation.kind, (1.0, 1.0))[backward]
        for tensor in (*operation.reads, operation.writes):
            token += passes * tensor.size.token
            keyed += passes * tensor.size.map
            fixed += passes * tensor.size.fixed
        # A weight in few bits is read and written whole.
        weights += UNPACKING * operation.unpacks
        if not backward:
            written[operation.writes.size] += 1
            continue
        for tensor in operation.reads:
            if tensor.grad:
                written[tensor.size] += 1
        if operation.trained and not operation.inside:
            size = float(operation.weight_elements * itemsize)
            gradients[size] += 1
            # filled with zeros first
            weights += size if operation.kind == "embedding" else 0.0
    return Work(products, Size(token, keyed, fixed), weights, written, gradients, count)


def _passes_of(operation: Operation, backward: bool) -> tuple[str, ...]:
    """Of each product of an operation in turn: what it reads has its gradient first."""
    if not backward:
        return ("forward",) * len(operation.forward)
    of_input = int(any(tensor.grad for tensor in operation.reads[:1]))
    return ("input",) * of_input + ("weight",) * (len(operation.backward) - of_input)


def _product_seconds(
    columns: NDArray[np.float64],
    tokens: NDArray[np.float64],
    keys: float,
    dtype: str,
    device: Device,
) -> NDArray[np.float64]:
    """Of all products together, at each batch; ``columns``: the fields of a ``Product``, and how
    many there are of it in each of ``PASSES``, [num_products, 8]."""
    inner, outer, heads, rows, wide, *times = columns.T[:, :, None]
    rows = np.where(rows, rows, tokens)
    outer = np.where(heads, heads * keys, outer)
    smallest = np.where(heads, inner, np.minimum(rows, np.minimum(inner, outer)))
    flops = 2.0 * rows * inner * outer
    attends = heads[:, 0] > 0
    seconds = np.zeros_like(flops)
    if not device.matmul_rates:  # peaks, of wide matrices however they lie
        speed = rate(device, dtype, smallest)
        speed[attends] = attention_rate(device, dtype, smallest[attends])
        seconds += sum(times) * flops / speed
    for name, number in zip(PASSES, times, strict=True) if device.matmul_rates else ():
        # Without instructions for it no block of a matrix is used twice.
        size = np.sqrt(inner * outer) + 0.0 * rows if dtype in device.emulated else smallest
        own = rate(device, dtype, size, name)
        speed = np.where(wide, rate(device, "float32", smallest, name), own)
        speed[attends] = attention_rate(device, dtype, smallest[attends], name)
        seconds += number * flops / speed
    together: NDArray[np.float64] = seconds.sum(axis=0)
    return together


def rate(device: Device, dtype: str, dimension: Any, of: str = "forward") -> Any:
    """FLOP/s of a product in one of ``PASSES`` whose smallest dimension is ``dimension``, a number
    or an array; of a dtype that is emulated: whose weight is square with that side."""
    curve = device.matmul_rates.get(dtype) or {}
    curve = device.gradient_rates.get(of, {}).get(dtype) or curve
    if curve:
        return _interpolated(curve, dimension)
    peak = device.flops_per_second.get(dtype) or device.flops_per_second["float32"]
    if device.kind == "cpu":
        return peak * np.minimum(1.0, 0.3 + np.asarray(dimension) / 512)
    return peak * LARGE_EFFICIENCY * np.minimum(1.0, (np.asarray(dimension) / _LARGE) ** 0.5)


def attention_rate(device: Device, dtype: str, head_size: Any, of: str = "forward") -> Any:
    """FLOP/s of fused attention over heads of this size, a number or an array. Below the smallest
    measured it falls with the size: an exponential a score is what is left to do."""
    curve = device.attention_rates.get(dtype) or {}
    if of != "forward":
        curve = device.gradient_rates.get("attention", {}).get(dtype) or curve
    if curve:
        smallest = min(curve)
        below = np.minimum(1.0, np.asarray(head_size) / smallest)
        return _interpolated(curve, np.maximum(head_size, smallest)) * below
    return ATTENTION_EFFICIENCY * rate(device, dtype, head_size)


def _interpolated(curve: Mapping[int, float], dimension: Any) -> Any:
    """Between measured sizes in log-log; below the smallest falling with the root, as the thin
    products of attention and LoRA do; flat above the largest."""
    sizes = sorted(curve)
    smallest = sizes[0]
    known = np.log([curve[size] for size in sizes])
    between = np.exp(np.interp(np.log(dimension), np.log(sizes), known))
    return between * np.minimum(1.0, np.asarray(dimension) / smallest) ** 0.5


def joules(seconds: float, device: Device) -> float | None:
    """At the device's design power; None where that is unknown."""
    return None if device.tdp_watts is None else seconds * device.tdp_watts
