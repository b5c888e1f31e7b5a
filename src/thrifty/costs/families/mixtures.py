"""Decoders with a mixture of experts in some or all layers: Mixtral, Qwen2/3-MoE, gpt-oss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from thrifty.costs.families.config import Config, linear_shapes
from thrifty.costs.families.gated import ATTENTION, attention_bias, gated
from thrifty.costs.shape import Experts, ModelShape


def with_experts(shape: ModelShape, experts: Experts) -> ModelShape:
    """``shape`` with experts; where every layer has them, there is no dense mlp."""
    if len(experts.layers) < shape.num_layers:
        return replace(shape, experts=experts)
    attention = tuple(linear for linear in shape.linears if linear.part == "attention")
    return replace(shape, linears=attention, experts=experts)


def experts_of(
    config: Config, layers: Iterable[int], *, num: int, active: int, **fields: Any
) -> Experts:
    if active > num:
        config.fail(f"a token cannot go through {active} of {num} experts")
    return Experts(layers=frozenset(layers), num_experts=num, num_active=active, **fields)


def mixtral(config: Config) -> ModelShape:
    window = config.window(0)
    layers = config.count("num_hidden_layers", 32)
    shape = gated(
        config,
        mlp=14336,
        key_value_heads=8,
        positions=4096 * 32,
        sliding_window=window,
        num_sliding_layers=layers if window else 0,
    )
    return with_experts(
        shape,
        experts_of(
            config,
            range(layers),
            num=config.count("num_local_experts", 8),
            active=config.count("num_experts_per_tok", 2),
            intermediate_size=shape.intermediate_size,
            router="softmax",
            normalised=True,
            wide_weights=True,
        ),
    )


def _sparse_layers(config: Config, layers: int) -> list[int]:
    """Those that ``decoder_sparse_step`` and ``mlp_only_layers`` leave to experts."""
    step, dense = config.count("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return [index for index in range(layers) if index not in dense and (index + 1) % step == 0]


def qwen2_moe(config: Config) -> ModelShape:
    window = config.window(4096) if config.flag("use_sliding_window") else 0
    layers = config.count("num_hidden_layers", 24)
    first = config.get("max_window_layers", 28)
    sliding = [index >= first for index in range(layers)]
    shape = gated(
        config,
        hidden=2048,
        mlp=5632,
        layers=24,
        heads=16,
        key_value_heads=16,
        vocab=151936,
        positions=32768,
        biased=ATTENTION[:3] if config.flag("qkv_bias", True) else (),
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
    )
    hidden = shape.hidden_size
    inner = config.count("shared_expert_intermediate_size", 5632)
    return with_experts(
        shape,
        experts_of(
            config,
            _sparse_layers(config, layers),
            num=config.count("num_experts", 60),
            active=config.count("num_experts_per_tok", 4),
            intermediate_size=config.count("moe_intermediate_size", 1408),
            router="softmax",
            normalised=config.flag("norm_topk_prob"),
            shared=linear_shapes(
                ("shared_expert_gate", hidden, 1, "mlp"),
                ("gate_proj", hidden, inner, "mlp"),
                ("up_proj", hidden, inner, "mlp"),
                ("down_proj", inner, hidden, "mlp"),
                biased=(),
            ),
        ),
    )


def qwen3_moe(config: Config) -> ModelShape:
    window = config.window(4096) if config.flag("use_sliding_window") else 0
    layers = config.count("num_hidden_layers", 24)
    shape = gated(
        config,
        hidden=2048,
        mlp=6144,
        layers=24,
        key_value_heads=4,
        vocab=151936,
        positions=32768,
        biased=attention_bias(config),
        qk_norm="head",
        sliding_window=window,
        num_sliding_layers=layers if window else 0,
    )
    return with_experts(
        shape,
        experts_of(
            config,
            _sparse_layers(config, layers),
            take_names=True,
            num=config.count("num_experts", 128, alias="num_local_experts"),
            active=config.count("num_experts_per_tok", 8),
            intermediate_size=config.count("moe_intermediate_size", 768),
            router="softmax",
            normalised=config.flag("norm_topk_prob"),
        ),
    )


def gpt_oss(config: Config) -> ModelShape:
    """Under bfloat16 its norms are bfloat16 too; float16 alone would keep them in float32."""
    window = config.window(128)
    layers = config.count("num_hidden_layers", 36)
    sliding = [index % 2 == 0 for index in range(layers)]
    shape = gated(
        config,
        hidden=2880,
        mlp=2880,
        layers=36,
        heads=64,
        key_value_heads=8,
        head_dim=64,
        vocab=201_088,
        positions=131_072,
        biased=ATTENTION if config.flag("attention_bias", True) else (),
        norm="wide",
        attention="eager",
        mask="given",
        sinks=True,
        paired_rotary=True,
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
    )
    return with_experts(
        shape,
        experts_of(
            config,
            range(layers),
            num=config.count("num_local_experts", 128, alias="num_experts"),
            active=config.count("num_experts_per_tok", 4),
            intermediate_size=shape.intermediate_size,
            bias=True,
            router="raw",
            router_bias=True,
        ),
    )
