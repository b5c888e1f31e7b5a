"""Rotary decoders with a gated mlp: Llama and those built like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thrifty.costs.families.config import Config, linear_shapes
from thrifty.costs.shape import ModelShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def gated(
    config: Config,
    *,
    hidden: int = 4096,
    mlp: int = 11008,
    layers: int = 32,
    heads: int = 32,
    key_value_heads: int = 0,
    head_dim: int = 0,
    vocab: int = 32000,
    positions: int = 2048,
    tied: bool = False,
    biased: Sequence[str] = (),
    fused: bool = False,
    **switches: Any,
) -> ModelShape:
    """A rotary decoder with a gated mlp; the sizes given are the defaults for missing keys.

    ``key_value_heads`` 0: as many as heads; ``head_dim`` 0: hidden / heads.
    """
    if "activation" not in switches:
        switches["activation"] = config.activation("hidden_act", "silu")
    if config.values.get("num_key_value_heads", 0) is None:  # a null has a meaning of its own
        key_value_heads = 0
    hidden = config.count("hidden_size", hidden)
    heads = config.count("num_attention_heads", heads)
    groups = config.count(
        "num_key_value_heads", key_value_heads or heads, derived=not key_value_heads
    )
    mlp = config.count("intermediate_size", mlp)
    if heads % groups:
        config.fail(f"{heads} attention heads are not a multiple of {groups} key-value heads")
    if hidden % heads and not head_dim and config.get("head_dim") is None:
        config.fail(f"hidden_size {hidden} is not a multiple of {heads} attention heads")
    head_dim = config.count("head_dim", head_dim or hidden // heads, derived=not head_dim)
    queries, keys = heads * head_dim, groups * head_dim
    if fused:
        linears = linear_shapes(
            ("qkv_proj", hidden, queries + 2 * keys, "attention"),
            ("o_proj", queries, hidden, "attention"),
            ("gate_up_proj", hidden, 2 * mlp, "mlp"),
            ("down_proj", mlp, hidden, "mlp"),
            biased=biased,
        )
    else:
        linears = linear_shapes(
            ("q_proj", hidden, queries, "attention"),
            ("k_proj", hidden, keys, "attention"),
            ("v_proj", hidden, keys, "attention"),
            ("o_proj", queries, hidden, "attention"),
            ("gate_proj", hidden, mlp, "mlp"),
            ("up_proj", hidden, mlp, "mlp"),
            ("down_proj", mlp, hidden, "mlp"),
            biased=biased,
        )
    return ModelShape(
        model_type=config.model_type,
        num_layers=config.count("num_hidden_layers", layers),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=config.count("vocab_size", vocab),
        max_position_embeddings=config.count("max_position_embeddings", positions),
        tie_word_embeddings=config.flag("tie_word_embeddings", tied),
        dtype=config.dtype(),
        linears=linears,
        norm_parameters=hidden,
        embedding_size=hidden,
        rotary_dim=config.rotary_dim(head_dim, "partial_rotary_factor", 1.0),
        attention_dropout=config.rate("attention_dropout", 0.0),
        **switches,
    )


def attention_bias(config: Config) -> tuple[str, ...]:
    return ATTENTION if config.flag("attention_bias") else ()


def llama(config: Config) -> ModelShape:
    return gated(config, biased=attention_bias(config) + (MLP if config.flag("mlp_bias") else ()))


def mistral(config: Config) -> ModelShape:
    window = config.window(4096)
    return gated(
        config,
        mlp=14336,
        key_value_heads=8,
        positions=4096 * 32,
        sliding_window=window,
        num_sliding_layers=config.count("num_hidden_layers", 32) if window else 0,
    )


def any_qwen(config: Config, **switches: Any) -> ModelShape:
    window = config.window(4096) if config.flag("use_sliding_window") else 0
    first = config.get("max_window_layers", 28)
    sliding = [index >= first for index in range(config.count("num_hidden_layers", 32))]
    return gated(
        config,
        mlp=22016,
        key_value_heads=32,
        vocab=151936,
        positions=32768,
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
        **switches,
    )


def qwen2(config: Config) -> ModelShape:
    return any_qwen(config, biased=ATTENTION[:3])


def qwen3(config: Config) -> ModelShape:
    return any_qwen(config, head_dim=128, biased=attention_bias(config), qk_norm="head")


def smollm3(config: Config) -> ModelShape:
    """Every fourth layer has no rotary embedding, which only its liveness would show."""
    layers = config.count("num_hidden_layers", 36)
    window = config.window(0) if config.flag("use_sliding_window") else 0
    every = config.count("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers", [(index + 1) % every for index in range(layers)])
    return gated(
        config,
        hidden=2048,
        layers=36,
        heads=16,
        key_value_heads=4,
        vocab=128_256,
        positions=32768,
        tied=True,
        biased=attention_bias(config) + (MLP if config.flag("mlp_bias") else ()),
        sliding_window=window,
        num_sliding_layers=config.num_sliding([not each for each in rotated]) if window else 0,
    )


def phi3(config: Config) -> ModelShape:
    window = config.window(0)
    return gated(
        config,
        hidden=3072,
        mlp=8192,
        vocab=32064,
        positions=4096,
        fused=True,
        sliding_window=window,
        num_sliding_layers=config.count("num_hidden_layers", 32) if window else 0,
        dropout=config.rate("resid_pdrop", 0.0),
    )
