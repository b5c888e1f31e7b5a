"""Gemma 1 to 3."""

from __future__ import annotations

from typing import Any

from thrifty.costs.families.config import Config
from thrifty.costs.families.gated import attention_bias, gated
from thrifty.costs.shape import ModelShape


def windowed_gemma(
    config: Config, *, period: int, softcap: float | None, **switches: Any
) -> ModelShape:
    """Every ``period``-th layer attends to all, the others to a window."""
    window = config.window(4096)
    sliding = [(index + 1) % period != 0 for index in range(config.count("num_hidden_layers", 26))]
    return gated(
        config,
        hidden=2304,
        mlp=9216,
        layers=26,
        heads=8,
        key_value_heads=4,
        head_dim=256,
        tied=True,
        biased=attention_bias(config),
        norm="wide",
        scaled_embedding=True,
        block="sandwich",
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
        logit_softcap=config.values.get("final_logit_softcapping", softcap) is not None,
        **switches,
    )


def gemma(config: Config) -> ModelShape:
    activation = config.activation("hidden_act", "gelu_pytorch_tanh")
    return gated(
        config,
        hidden=3072,
        mlp=24576,
        layers=28,
        heads=16,
        key_value_heads=16,
        head_dim=256,
        vocab=256_000,
        positions=8192,
        tied=True,
        biased=attention_bias(config),
        norm="wide",
        scaled_embedding=True,
        # "gelu" in the first releases' configs means the tanh form, and transformers reads it so.
        activation="gelu_pytorch_tanh" if activation == "gelu" else activation,
    )


def gemma2(config: Config) -> ModelShape:
    return windowed_gemma(
        config,
        period=2,
        softcap=30.0,
        vocab=256_000,
        positions=8192,
        attention="eager",
        attention_softcap=config.values.get("attn_logit_softcapping", 50.0) is not None,
    )


def gemma3(config: Config) -> ModelShape:
    period = config.get("sliding_window_pattern", 6)
    return windowed_gemma(
        config,
        period=period,
        softcap=None,
        vocab=262_208,
        positions=131_072,
        qk_norm="head",
        rotary_per_kind=True,
    )
