"""Predicted cost of passes that give single examples' gradients (``example_gradients.py``)."""

from __future__ import annotations

from dataclasses import replace

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Work
from thrifty.costs.flops import step_flops
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.time import step_seconds
from thrifty.signals.example_gradients import BATCH_TOKENS, LARGEST_PRODUCT
from thrifty.signals.forward import as_read, mean_flops, padding, shape_of


def gradients_cost(
    work: Work, stats: PoolStats, setting: MemorySetting, elements: int, model: str = ""
) -> Cost:
    """Predicted cost of ``each_batch`` over rows like ``stats`` where ``setting`` says what is
    wanted, with as many gradients of ``elements`` as a batch has rows beside it."""
    if not stats.num_examples:
        return Cost()
    shape = shape_of(work, model)
    stats = as_read(work, stats, model)
    length, longest, rows = _usual_batch(work, stats)
    setting = replace(
        setting,
        dtype=work.dtype,
        masked=False,
        device_kind=work.device.kind,
        micro_batch=rows,
        sequence=length,
    )
    flops = mean_flops(
        lambda tokens: step_flops(shape, replace(setting, micro_batch=1, sequence=tokens)),
        stats,
        length,
    )
    widest = replace(setting, micro_batch=max(1, BATCH_TOKENS // longest), sequence=longest)
    return Cost(
        flops=flops * stats.num_examples * padding(stats, longest, rows),
        seconds=step_seconds(shape, setting, work.device) * stats.num_examples / rows,
        peak_memory_bytes=account(shape, widest).peak_memory_bytes
        + 4.0 * rows * min(elements, LARGEST_PRODUCT),
    )


def padded_tokens(work: Work, stats: PoolStats) -> float:
    """Predicted tokens of the batches of ``each_batch`` over rows like ``stats``."""
    if not stats.num_examples:
        return 0.0
    length, longest, rows = _usual_batch(work, stats)
    return min(stats.num_tokens, stats.num_examples * length) * padding(stats, longest, rows)


def _usual_batch(work: Work, stats: PoolStats) -> tuple[int, int, int]:
    """Tokens of the mean and of the longest example, and examples of a batch."""
    length = max(2, min(round(stats.mean_tokens), work.max_length))
    longest = min(max(stats.max_tokens, 2), work.max_length)
    return length, longest, max(1, min(BATCH_TOKENS // length, stats.num_examples))
