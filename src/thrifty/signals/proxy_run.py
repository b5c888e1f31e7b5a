"""A short training run of a copy of a model, watched from within: what each example did meanwhile.

Every statistic comes from the forward pass that trains on the example, so that watching costs no
pass of its own; it is of the weights just before the step that the example is part of. Batches hold
examples of like lengths and are the same in every epoch, in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Tokens, Work
from thrifty.costs.flops import train_flops
from thrifty.costs.memory import Adapter, account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.time import step_seconds
from thrifty.data.packing import padded_batches
from thrifty.signals.adapters import sharing_copy, with_adapter
from thrifty.signals.forward import (
    as_read,
    mean_flops,
    next_token_losses,
    padded,
    padding,
    shape_of,
)

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape

BATCH_TOKENS = 2048
"""Padded tokens of an optimizer step, one example at least."""

Watch = Callable[[int, list[int], Any, Any, Any, Any], None]
"""(epoch, places, nll, logits, ids, keep): the last four ``[batch, sequence - 1, ...]``."""


def proxy_run(
    model: Any,
    shape: ModelShape,
    examples: Sequence[Tokens],
    meter: Meter,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    watch: Watch | None = None,
    adapter: Adapter | None = None,
    after_epoch: Callable[[Any, Any], None] | None = None,
) -> Any:
    """A trained copy of ``model``, which stays as it is: all weights, or an ``adapter`` on them,
    AdamW at a constant learning rate, gradients clipped at 1.

    Ticks ``meter`` with the FLOPs of every batch as padded. ``after_epoch`` is given the copy and
    its optimizer.
    """
    import torch

    if adapter is None:
        copied = copy.deepcopy(model).train()
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    else:
        targets = adapter.targets or shape.lora_targets
        alpha = 2.0 * adapter.rank
        shared = sharing_copy(model)
        copied = with_adapter(shared, targets, adapter.rank, alpha, seed, adapter.layers)
        copied.train()
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    lengths = [len(example.input_ids) for example in examples]
    batches = padded_batches(lengths, max(BATCH_TOKENS, max(lengths, default=1)))
    for epoch in range(epochs):
        for place in np.random.default_rng((seed, epoch)).permutation(len(batches)).tolist():
            batch = batches[place]
            ids, keep = padded([examples[i] for i in batch], device)
            if not bool(keep.any()):
                continue
            meter.tick(Cost(flops=train_flops(shape, *ids.shape, adapter=adapter)))
            with torch.enable_grad():
                logits = copied(input_ids=ids, use_cache=False).logits[:, :-1].float()
                nll = next_token_losses(logits, ids)
                ((nll * keep).sum() / keep.sum()).backward()
            if watch is not None:
                with torch.no_grad():
                    watch(epoch, batch, nll.detach(), logits.detach(), ids[:, 1:], keep)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if after_epoch is not None:
            after_epoch(copied, optimizer)
    return copied.eval()


def proxy_run_cost(
    work: Work, stats: PoolStats, epochs: int, model: str = "", adapter: Adapter | None = None
) -> Cost:
    """Predicted, over rows like ``stats``."""
    if not stats.num_examples:
        return Cost()
    shape = shape_of(work, model)
    stats = as_read(work, stats, model)
    length = max(2, min(round(stats.mean_tokens), work.max_length))
    longest = min(max(stats.max_tokens, 2), work.max_length)
    examples = max(1, BATCH_TOKENS // length)
    setting = MemorySetting(
        micro_batch=max(1, BATCH_TOKENS // longest),
        sequence=longest,
        dtype=work.dtype,
        masked=False,
        device_kind=work.device.kind,
        adapter=adapter,
    )
    flops = mean_flops(lambda tokens: train_flops(shape, 1, tokens, adapter=adapter), stats, length)
    copied = 0 if adapter else shape.num_parameters * (4 if work.dtype == "float32" else 2)
    usual = replace(setting, micro_batch=min(examples, stats.num_examples), sequence=length)
    steps = epochs * stats.num_examples / min(examples, stats.num_examples)
    return Cost(
        flops=epochs * flops * stats.num_examples * padding(stats, longest, examples),
        seconds=steps * step_seconds(shape, usual, work.device),
        peak_memory_bytes=account(shape, setting).peak_memory_bytes + copied,
    )
