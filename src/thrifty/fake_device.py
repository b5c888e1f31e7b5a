"""Answers that torch and transformers would give on real data and on a setting's own device.

For ``device_kind`` "cuda" the choices that change what is kept are CUDA's, on fake tensors that
live on the CPU: dropout keeps a byte an element, attention stays fused under dropout and over
values narrower than their keys. Otherwise the CPU's fused attention keeps what CUDA's keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from thrifty.costs.setting import MemorySetting


@contextmanager
def as_on_the_device(setting: MemorySetting, *, meta: bool = False) -> Iterator[None]:
    """Has torch and transformers answer so within the block; ``meta``: to tensors of the meta
    device as to fake ones."""
    from transformers import masking_utils
    from transformers.utils import import_utils

    changes: list[tuple[Any, str, Any]] = []
    if not setting.masked:
        # Whether rows hold several documents is read off data; fake tensors are taken to hold some.
        changes.append((masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
    attention = functional.scaled_dot_product_attention
    if meta:
        attention = partial(_attention_on_meta, attention)
        # Nobody looks at data: neither transformers nor what checks a distribution's parameters.
        changes.append((import_utils, "is_fake_tensor", lambda tensor: True))
        changes.append((torch.distributions.Distribution, "_validate_args", False))
    if setting.device_kind == "cuda":
        attention = partial(_attention_on_cuda, attention)
        changes.append((functional, "dropout", _dropout_on_cuda))
    changes.append((functional, "scaled_dot_product_attention", attention))
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, function in changes:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _attention_on_meta(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Fused where a CPU's is, of which the meta device knows nothing."""
    plain = dropout_p or query.shape[-1] != value.shape[-1] or query.dim() != 4
    if plain or (attn_mask is not None and attn_mask.requires_grad):
        options: dict[str, Any] = dict(scale=scale, enable_gqa=enable_gqa)
        return attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.zeros((), dtype=query.dtype))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _attention_on_cuda(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Fused also under dropout, which is drawn again in the backward and leaves nothing, and where
    values are narrower than keys (latent attention)."""
    options: dict[str, Any] = dict(is_causal=is_causal, scale=scale)
    if query.shape[-1] == value.shape[-1]:
        options |= dict(attn_mask=attn_mask, enable_gqa=enable_gqa)
        return attention(query, key, value, **options)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            hidden = attn_mask.logical_not()
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(hidden, -1e4)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, **options)[0]


def _dropout_on_cuda(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input
