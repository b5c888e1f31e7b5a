"""Seconds of a training step or a forward pass: a roofline by kind of work, then joules.

    t = a * sum over products of FLOPs / rate(smallest dimension)      matrix products
      + b * bytes through memory / bandwidth                           norms, activations, loss
      + c * number of operations * launch time                         what rules small models
      + d * bytes of weights, gradients and moments / bandwidth        the optimizer

Rates, bandwidth and launch time are the device's; a, b, c, d were fitted to real steps by
`thrifty device` (1 for a device from the table, whose rates are its peaks times an efficiency that
grows with the smallest dimension: 0.55 from 2,048 on).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from thrifty.costs.flops import forward_flops, train_flops
from thrifty.costs.hardware import Device
from thrifty.costs.memory import ITEMSIZE, MemorySetting
from thrifty.costs.shape import ModelShape

LARGE_EFFICIENCY = 0.55
"""Share of the peak that large matrix products of real training reach (MFU of well-run jobs)."""
_LARGE = 2048
_OPERATIONS_PER_LAYER = 34
"""Forward, a Llama layer in eager transformers; the backward launches about twice as many."""
_OPERATIONS_BESIDE = 40


def step_seconds(
    shape: ModelShape,
    setting: MemorySetting,
    device: Device,
    kind: Literal["train", "forward"] = "train",
) -> float:
    """One micro-batch: forward, backward and the optimizer's step, or a forward pass."""
    terms = step_terms(shape, setting, device, kind)
    return sum(factor * term for factor, term in zip(device.factors, terms, strict=True))


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
    tokens, size = setting.tokens, ITEMSIZE[setting.dtype]
    batch, sequence = setting.micro_batch, setting.sequence
    products = _forward_products(shape, tokens, sequence, setting.dtype, device)
    passes = 1.0
    trained = 0.0
    if kind == "train":
        forward = forward_flops(shape, batch, sequence)
        whole = train_flops(
            shape, batch, sequence, adapter=setting.adapter, recompute=setting.recompute
        )
        products *= whole / forward
        passes = 3.0 + setting.recompute
        trained = float(
            shape.num_parameters if setting.adapter is None else _adapter_size(shape, setting)
        )
    hidden, inner = shape.hidden_size, shape.intermediate_size
    elements = shape.num_layers * (14 * hidden + 4 * inner) + 3 * hidden
    moved = tokens * (elements * size + 4 * 4 * shape.vocab_size) * passes
    if setting.masked:
        moved += passes * shape.num_layers * shape.num_attention_heads * tokens * sequence * size
    launches = (_OPERATIONS_PER_LAYER * shape.num_layers + _OPERATIONS_BESIDE) * passes
    optimizer = trained * size * 7 / device.bytes_per_second
    return (
        products,
        moved / device.bytes_per_second,
        launches * device.operation_seconds,
        optimizer,
    )


def _adapter_size(shape: ModelShape, setting: MemorySetting) -> float:
    assert setting.adapter is not None
    names = setting.adapter.targets or shape.lora_targets
    wanted = [x for x in shape.linears if x.name in names]
    sides = sum(x.in_features + x.out_features for x in wanted)
    return float(shape.num_layers * setting.adapter.rank * sides)


def _forward_products(
    shape: ModelShape, tokens: int, sequence: int, dtype: str, device: Device
) -> float:
    """Seconds of a forward pass's matrix products."""
    seconds = 0.0
    for linear in shape.linears:
        flops = 2.0 * tokens * linear.in_features * linear.out_features * shape.num_layers
        seconds += flops / rate(device, dtype, min(linear.in_features, linear.out_features))
    head = 2.0 * tokens * shape.hidden_size * shape.vocab_size
    seconds += head / rate(device, dtype, min(shape.hidden_size, shape.vocab_size))
    width = shape.num_attention_heads * shape.head_dim
    attention = 4.0 * tokens * sequence * width * shape.num_layers
    return seconds + attention / rate(device, dtype, shape.head_dim)


def rate(device: Device, dtype: str, dimension: int) -> float:
    """FLOP/s of a product whose smallest dimension is ``dimension``."""
    curve = device.matmul_rates.get(dtype) or {}
    if curve:
        return _interpolated(curve, dimension)
    peak = device.flops_per_second.get(dtype) or device.flops_per_second["float32"]
    if device.kind == "cpu":
        return peak * min(1.0, 0.3 + dimension / 512)
    return peak * LARGE_EFFICIENCY * min(1.0, (dimension / _LARGE) ** 0.5)


def _interpolated(curve: Mapping[int, float], dimension: int) -> float:
    """Between measured sizes in log-log, flat beyond them."""
    sizes = sorted(curve)
    if dimension <= sizes[0]:
        return curve[sizes[0]]
    for low, high in pairwise(sizes):
        if dimension <= high:
            share = math.log(dimension / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))
    return curve[sizes[-1]]


def joules(seconds: float, device: Device) -> float | None:
    """At the device's design power; None where that is unknown."""
    return None if device.tdp_watts is None else seconds * device.tdp_watts
