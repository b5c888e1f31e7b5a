"""What answers of a model in this process take, whichever way their tokens are made.

One prompt is read once, however many answers are sampled from it; then a pass a token:

    FLOPs = prompt(W) + sum over answers of sum_{i=0..n-2} pass(1 token on W + i)

An early exit ends a token's pass after l of L layers. Of the layers that it skips only keys and
values are made, of the state that it left with (CALM, arXiv:2207.07061), and the head is applied
wherever it is asked whether to leave. A draft model guesses k tokens, which the model checks in one
pass of k + 1 (``speculation.py``).

Lengths are those executed, padding included. Whoever samples pays for all that was computed, also
for drafts that were thrown away.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from thrifty.core.budget import Cost
from thrifty.costs.flops import decode_flops, forward_flops, score_flops
from thrifty.costs.memory import MemorySetting, kv_cache_bytes
from thrifty.costs.shape import ITEMSIZE
from thrifty.costs.time import LARGE_EFFICIENCY, forward_seconds, step_terms
from thrifty.costs.token_settings import EarlyExit, KVCache, TokenSettings

if TYPE_CHECKING:
    from thrifty.costs.hardware import Device
    from thrifty.costs.shape import ModelShape

CACHE_GROUP = 32
"""Tokens of a cache in few bits whose keys share their scales; the last ones stay as they are."""
SCALE_BYTES = 4
"""Of a scale and an offset in float16."""


# -- FLOPs ----------------------------------------------------------------------------------------


def prompt_flops(shape: ModelShape, width: int) -> float:
    """Of reading a prompt once, with the logits of what follows."""
    return decode_flops(shape, 1, width, 1)


def token_flops(shape: ModelShape, cached: int) -> float:
    """A token's pass, on top of ``cached`` tokens."""
    return decode_flops(shape, 1, cached, 2) - decode_flops(shape, 1, cached, 1)


def pass_flops(shape: ModelShape, new: int, cached: int, logits: int) -> float:
    """``new`` tokens at once on top of ``cached`` ones, with the logits of some; of models whose
    layers all see all tokens."""
    linear, attention, head = _per_token(shape)
    return new * (linear + attention * (cached + new)) + logits * head


def exit_flops(shape: ModelShape, early: EarlyExit, cached: int, layer: int) -> float:
    """A token's pass that ends after ``layer`` layers: these, the head each time that it was asked,
    and the keys and values of the others."""
    linear, attention, head = _per_token(replace(shape, num_layers=layer))
    asked = sum(each <= layer for each in early.asked_after(shape.num_layers))
    asked += layer == shape.num_layers
    copied = (shape.num_layers - layer) * key_value_flops(shape)
    return linear + attention * (cached + 1) + asked * head + copied


def key_value_flops(shape: ModelShape) -> float:
    """Keys and values of a token in one layer; where one product makes the queries too, theirs."""
    *into, _ = (each for each in shape.linears if each.part == "attention")
    return sum(2.0 * each.in_features * each.out_features for each in into if each.name != "q_proj")


@lru_cache(maxsize=256)
def _per_token(shape: ModelShape) -> tuple[float, float, float]:
    """FLOPs of the layers per token, of attention per token and key, of the head per token."""
    one, two = (score_flops(shape, 1, length, logits=False) for length in (1, 2))
    attention = two / 2 - one
    return one - attention, attention, forward_flops(shape, 1, 1) - one


def round_flops(shape: ModelShape, draft: ModelShape, drafted: int, cached: int) -> float:
    """A round at its dearest: the draft first catches up with a token that it has not read."""
    first = pass_flops(draft, 2, cached, 1)
    rest = sum(pass_flops(draft, 1, cached + 1 + i, 1) for i in range(1, drafted))
    return first + rest + pass_flops(shape, drafted + 1, cached, drafted + 1)


def tokens_a_round(acceptance: float, drafted: int) -> float:
    """Expected, of a draft of so many tokens."""
    if acceptance >= 1:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


# -- bytes ----------------------------------------------------------------------------------------


def cache_bytes(
    shape: ModelShape, rows: int, context: int, dtype: str, cache: KVCache | None = None
) -> float:
    """What is kept of ``context`` tokens of so many rows."""
    if cache is None:
        return kv_cache_bytes(shape, rows, context, dtype)
    if cache.window:
        return kv_cache_bytes(shape, rows, cache.kept(context), dtype)
    grouped = context // CACHE_GROUP * CACHE_GROUP
    size, heads = shape.head_dim, shape.num_key_value_heads
    # Codes of both; scales of the keys by channel and group, of the values by token.
    packed = grouped * (2 * size * cache.bits / 8 + SCALE_BYTES * (size / CACHE_GROUP + 1))
    rest = (context - grouped) * 2 * size * ITEMSIZE[dtype]
    return rows * shape.num_layers * heads * (packed + rest)


# -- seconds --------------------------------------------------------------------------------------


def decode_seconds(
    shape: ModelShape, rows: int, prompt: int, generated: int, dtype: str, device: Device
) -> float:
    """Of ``rows`` prompts read together, and a pass a token of all of them."""
    step = token_seconds(shape, rows, prompt + generated // 2, dtype, device)
    return forward_seconds(shape, rows, prompt, dtype, device) + (generated - 1) * step


def token_seconds(
    shape: ModelShape, rows: int, context: int, dtype: str, device: Device, new: int = 1
) -> float:
    """A pass of ``rows`` over ``new`` tokens each, which reads all that the cache holds, and waits
    for the weights where there is little to do with them.

    Of a GPU whose small products were not measured these are taken to be as fast as large ones:
    what slows them down is that wait."""
    setting = MemorySetting(
        micro_batch=rows, sequence=new, dtype=dtype, masked=False, device_kind=device.kind
    )
    products, moved, kernels, _ = step_terms(shape, setting, device, "forward")
    if device.kind == "cuda" and not device.matmul_rates.get(dtype):
        rate = LARGE_EFFICIENCY * device.flops_per_second[dtype]
        products = forward_flops(shape, rows, new) / rate
    weights = _weights_read(shape, rows * new) * ITEMSIZE[dtype]
    cached = kv_cache_bytes(shape, rows, context, dtype)
    a, b, c, _ = device.factors.get(dtype, (1.0, 1.0, 1.0, 1.0))
    waits = max(a * products, weights / device.bytes_per_second)
    return waits + b * (moved + cached / device.bytes_per_second) + c * kernels


def _weights_read(shape: ModelShape, tokens: int) -> float:
    """Elements that a pass over so many tokens reads: of the embedding their own rows, of experts
    those that they go through."""
    parts = shape.parameters_by_part
    found = float(shape.num_parameters + shape.head_parameters)
    found -= parts["embedding"] + parts["experts"] + parts["head"]
    if shape.experts is not None:
        share = tokens * shape.experts.num_active / shape.experts.num_experts
        found += parts["experts"] * min(1.0, share)
    return found


# -- a request ------------------------------------------------------------------------------------


def request_cost(
    shape: ModelShape,
    prompt: int,
    generated: int,
    dtype: str,
    device: Device,
    *,
    count: int = 1,
    settings: TokenSettings | None = None,
    draft: ModelShape | None = None,
    layer: float | None = None,
    acceptance: float = 0.0,
) -> Cost:
    """``count`` answers of ``generated`` tokens to one prompt, which is read once.

    ``layer``: after which tokens leave on average, by default the last; ``acceptance``: of a
    drafted token. With the defaults it is the most that a request can take. The peak is that of
    weights and cache.
    """
    settings = settings or TokenSettings()
    steps, middle = max(generated - 1, 0), prompt + generated // 2
    flops = prompt_flops(shape, prompt)
    seconds = forward_seconds(shape, 1, prompt, dtype, device)
    held = [(shape, settings.kv_cache)]
    if settings.exits is not None and settings.exits.threshold < 1:
        layer = float(shape.num_layers) if layer is None else layer
        each = sum(_exit_at(shape, settings.exits, prompt + i, layer) for i in range(steps))
        whole = decode_flops(shape, 1, prompt, steps + 1) - flops
        share = each / whole if whole else 0.0
        seconds += steps * share * token_seconds(shape, count, middle, dtype, device)
    elif draft is not None:
        drafted = settings.draft_tokens
        rounds = math.ceil(steps / tokens_a_round(acceptance, drafted))
        # The longest of a batch sets the width: all are taken to be as long as they can get.
        each = rounds * round_flops(shape, draft, drafted, prompt + generated)
        flops += prompt_flops(draft, prompt)
        seconds += forward_seconds(draft, 1, prompt, dtype, device)
        checking = token_seconds(shape, count, middle, dtype, device, drafted + 1)
        drafting = drafted * token_seconds(draft, count, middle, dtype, device)
        seconds += rounds * (checking + drafting)
        held.append((draft, None))
    elif settings.kv_cache is not None and settings.kv_cache.window:
        kept = settings.kv_cache.kept
        each = sum(token_flops(shape, kept(prompt + i)) for i in range(steps))
        seconds += steps * token_seconds(shape, count, kept(middle), dtype, device)
    else:
        each = decode_flops(shape, 1, prompt, steps + 1) - flops
        seconds += steps * token_seconds(shape, count, middle, dtype, device)
    most = prompt + generated
    return Cost(
        flops=flops + count * each,
        tokens=prompt + count * generated,
        seconds=seconds,
        peak_memory_bytes=sum(
            model.num_parameters * ITEMSIZE[dtype] + cache_bytes(model, count, most, dtype, cache)
            for model, cache in held
        ),
    )


def _exit_at(shape: ModelShape, early: EarlyExit, cached: int, layer: float) -> float:
    """Between two layers a mean of both."""
    low = min(int(layer), shape.num_layers)
    high = min(low + 1, shape.num_layers)
    below, above = (exit_flops(shape, early, cached, each) for each in (low, high))
    return below + (layer - low) * (above - below)
