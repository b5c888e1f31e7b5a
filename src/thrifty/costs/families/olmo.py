"""OLMo 1 to 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from thrifty.costs.families.config import Config
from thrifty.costs.families.gated import attention_bias, gated
from thrifty.costs.shape import ModelShape


def any_olmo(config: Config, **switches: Any) -> ModelShape:
    fields = {"norm": "bare", "clips": config.get("clip_qkv") is not None, **switches}
    biased = attention_bias(config)
    return gated(config, vocab=50304, biased=biased, wide_rotary=True, **fields)


def olmo(config: Config) -> ModelShape:
    return replace(any_olmo(config), norm_parameters=0)


def olmo2(config: Config, **switches: Any) -> ModelShape:
    return any_olmo(config, norm="wide", block="branch", qk_norm="all", clips=False, **switches)


def olmo3(config: Config) -> ModelShape:
    window = config.window(4096)
    sliding = [(index + 1) % 4 != 0 for index in range(config.count("num_hidden_layers", 32))]
    return olmo2(
        config,
        rotary_per_kind=True,
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
    )
