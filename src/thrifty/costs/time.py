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

Limits: products and memory traffic do not overlap; no communication, no data loading.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from thrifty.costs.hardware import Device
from thrifty.costs.layer import Setup, embedding, head, layers
from thrifty.costs.memory import (
    MemorySetting,
    num_trained,
    saved_bytes,
    setup_of,
)
from thrifty.costs.operations import Operation, Product, Size, recomputed
from thrifty.costs.shape import ModelShape

LARGE_EFFICIENCY = 0.55
"""Share of the peak that large matrix products of real training reach (MFU of well-run jobs)."""
_LARGE = 2048
ATTENTION_EFFICIENCY = 0.55
"""Of fused attention beside a matrix product of its head size, where it was not measured."""
CAUSAL_BLOCK = 256
"""Keys that a causal kernel handles at once; beyond it, it skips those to come."""

SECONDS_MARGIN = 1.25
"""How much slower than predicted, or than it lately was, anything may turn out: what is reserved
for it over what it should take."""

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
    terms = step_terms(shape, setting, device, kind)
    factors = device.factors.get(setting.dtype, (1.0, 1.0, 1.0, 1.0))
    return sum(factor * term for factor, term in zip(factors, terms, strict=True))


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
    train = kind == "train"
    work = _work(shape, setup_of(shape, setting, backward=train))
    tokens, sequence = setting.tokens, setting.sequence
    keys = sequence if setting.masked else min(sequence, (sequence + CAUSAL_BLOCK) / 2)
    products = 0.0
    for product, times in work.products.items():
        flops, dimension = _product(product, tokens, keys)
        speed = (attention_rate if product.heads else rate)(device, setting.dtype, dimension)
        products += times * flops / speed
    moved = work.moved.at(tokens, sequence) + work.moved_weights
    memory = moved / device.bytes_per_second
    if device.kind == "cpu":
        sizes = [(size.at(tokens, sequence), n) for size, n in work.written.items()]
        sizes += work.gradients.items()
        fresh = sum(size * n for size, n in sizes if size > MMAP_THRESHOLD)
        if train:
            kept = saved_bytes(shape, setting, head=False)
            fresh += max(0.0, kept - TRIM_THRESHOLD)
        memory += device.fault_seconds * fresh
    trained = num_trained(shape, setting) * setting.trained_itemsize if train else 0.0
    return (
        products,
        memory,
        work.kernels * device.operation_seconds,
        7.0 * trained / device.bytes_per_second,
    )


class Work(NamedTuple):
    """What a step does, independent of its tokens."""

    products: Counter[Product]
    moved: Size
    """Read and written by elementwise kernels."""
    moved_weights: float
    written: Counter[Size]
    """Buffers allocated."""
    gradients: Counter[float]
    """Weight gradients allocated, bytes of each."""
    kernels: float


@lru_cache(maxsize=1024)
def _work(shape: ModelShape, setup: Setup) -> Work:
    products: Counter[Product] = Counter()
    written: Counter[Size] = Counter()
    gradients: Counter[float] = Counter()
    token = keyed = kernels = weights = 0.0

    def add(operation: Operation, *, backward: bool) -> None:
        nonlocal token, keyed, kernels, weights
        done = operation.backward if backward else operation.forward
        products.update(done)
        passes = operation.passes[backward]
        kernels += passes + len(done)
        if setup.on_cpu:
            passes *= CPU_PASSES.get(operation.kind, (1.0, 1.0))[backward]
        for tensor in (*operation.reads, operation.writes):
            token += passes * tensor.size.token
            keyed += passes * tensor.size.map
        if not backward:
            written[operation.writes.size] += 1
            return
        written.update(tensor.size for tensor in operation.reads if tensor.grad)
        if operation.trained:
            size = operation.weight_elements * setup.itemsize
            gradients[size] += 1
            weights += size if operation.kind == "embedding" else 0.0  # filled with zeros first

    body = tuple(layers(shape, setup))
    for operations in (embedding(shape, setup), *body, head(shape, setup)):
        for operation in operations:
            if operation.kind == "hold":
                continue
            add(operation, backward=False)
            if operation.writes.grad:
                add(operation, backward=True)
    if setup.recompute:
        for operations in body:
            for operation in recomputed(operations):
                if operation.kind != "hold":
                    add(operation, backward=False)
    return Work(products, Size(token, keyed), weights, written, gradients, kernels)


def _product(product: Product, tokens: int, keys: float) -> tuple[float, int]:
    """FLOPs and smallest dimension."""
    if product.heads:
        return 2.0 * product.heads * product.inner * tokens * keys, product.inner
    flops = 2.0 * tokens * product.inner * product.columns
    return flops, min(tokens, product.inner, product.columns)


def rate(device: Device, dtype: str, dimension: int) -> float:
    """FLOP/s of a product whose smallest dimension is ``dimension``."""
    curve = device.matmul_rates.get(dtype) or {}
    if curve:
        return _interpolated(curve, dimension)
    peak = device.flops_per_second.get(dtype) or device.flops_per_second["float32"]
    if device.kind == "cpu":
        return peak * min(1.0, 0.3 + dimension / 512)
    return peak * LARGE_EFFICIENCY * min(1.0, (dimension / _LARGE) ** 0.5)


def attention_rate(device: Device, dtype: str, head_size: int) -> float:
    """FLOP/s of fused attention over heads of this size. Below the smallest measured it falls with
    the size: an exponential a score is what is left to do."""
    curve = device.attention_rates.get(dtype) or {}
    if curve:
        smallest = min(curve)
        return _interpolated(curve, max(head_size, smallest)) * min(1.0, head_size / smallest)
    return ATTENTION_EFFICIENCY * rate(device, dtype, head_size)


def _interpolated(curve: Mapping[int, float], dimension: int) -> float:
    """Between measured sizes in log-log; below the smallest falling with the root, as the thin
    products of attention and LoRA do; flat above the largest."""
    sizes = sorted(curve)
    if dimension <= sizes[0]:
        return curve[sizes[0]] * (dimension / sizes[0]) ** 0.5
    for low, high in pairwise(sizes):
        if dimension <= high:
            share = math.log(dimension / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))
    return curve[sizes[-1]]


def joules(seconds: float, device: Device) -> float | None:
    """At the device's design power; None where that is unknown."""
    return None if device.tdp_watts is None else seconds * device.tdp_watts
