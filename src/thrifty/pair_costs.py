"""What training on pairs takes: batches padded to their longest answer, and the reference.

A step is bounded by one of the longest pairs; what it takes on average is that of a batch as long
as pairs are on average, their shorter side padded to their longer one.
"""

from __future__ import annotations

from dataclasses import replace

from thrifty.core.budget import Cost, PoolStats
from thrifty.costs.flops import step_flops
from thrifty.costs.hardware import Device
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.signals.forward import forward_cost

SIDES = 2
"""Sequences of a pair."""
WINDOW = 1024
"""Pairs among which those of like lengths come together (``data/pairs.py``)."""
LOGITS_AT_A_TIME = 4096
"""Tokens whose logits TRL's ``DPOTrainer`` holds at a time, made again for their backward
(trl 1.16, ``kernels/chunked_logprob.py``)."""


def as_sequences(pairs: PoolStats) -> PoolStats:
    """The sequences that a model reads, for what prices a pass over them."""
    return replace(pairs, num_examples=SIDES * pairs.num_examples)


def on_average(
    micro: Cost, shape: ModelShape, setting: MemorySetting, pool: PoolStats | None
) -> Cost:
    """A micro-batch of pairs like ``pool``'s, where ``micro`` is one of the longest; its tokens are
    those that are no padding."""
    if pool is None or not pool.num_padded_tokens:
        return micro
    longer = pool.num_padded_tokens / (SIDES * pool.num_examples)
    pairs = setting.micro_batch / SIDES
    spread = pairs / min(pool.num_examples, WINDOW)  # of the lengths in a batch, of all there are
    length = longer + 0.5 * spread * (pool.max_tokens - longer)
    length = min(max(round(length), 1), setting.sequence)
    shorter = replace(setting, sequence=length)
    share = step_flops(shape, shorter) / step_flops(shape, setting)
    return replace(
        micro,
        flops=micro.flops * share,
        seconds=micro.seconds * share,
        tokens=pairs * pool.num_tokens / pool.num_examples,
    )


def reference_cost(
    shape: ModelShape, pairs: PoolStats, setting: MemorySetting, device: Device
) -> Cost:
    """Of asking the reference once for all of ``pairs``, in batches no larger than a training
    pass."""
    stats = as_sequences(pairs)
    cost = forward_cost(shape, stats, device, setting.dtype, setting.sequence, setting.tokens)
    return replace(cost, peak_memory_bytes=0.0)


def why_no_pairs(setting: MemorySetting) -> str | None:
    """Why pairs cannot be trained on in steps that are held like this; None where they can."""
    if setting.zeroth_order or setting.short:
        return "pairs are trained on by gradients, of which a zeroth-order step has none"
    if setting.loss_fused:
        return "the loss of pairs is another than the one whose gradient is made with it"
    if setting.replicas > 1:
        return "pairs are trained on by one device"
    adapter = setting.adapter
    if adapter is None:
        return None
    if adapter.form == "adalora":
        return "PEFT's AdaLoRA is alone on its model, and DPOTrainer puts a second adapter there"
    if setting.reference and adapter.start:
        return (
            f"{adapter.start} begins with other weights than the base model's, so that the model "
            "without its adapter is no reference; training.preference.precompute_ref_log_probs: "
            "true asks it before the first step"
        )
    return None
