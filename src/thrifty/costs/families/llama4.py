"""The text part of Llama 4: Scout and Maverick."""

from __future__ import annotations

from dataclasses import replace

from thrifty.costs.families.config import Config, linear_shapes
from thrifty.costs.families.gated import attention_bias, gated
from thrifty.costs.families.mixtures import experts_of, with_experts
from thrifty.costs.shape import LinearShape, ModelShape


def llama4_text(config: Config) -> ModelShape:
    """Layers that rotate attend within chunks, which cost what windows do."""
    layers = config.count("num_hidden_layers", 48)
    hidden = config.count("hidden_size", 5120)
    inner = config.count("intermediate_size", 8192)
    dense = config.count("intermediate_size_mlp", 16384)
    every = config.count("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(index + 1) % every for index in range(layers)]
    chunk = config.count("attention_chunk_size", 8192)
    step = config.count("interleave_moe_layer_step", 1)
    mixtures = config.get("moe_layers", list(range(step - 1, layers, step)))
    shape = gated(
        config,
        hidden=hidden,
        layers=48,
        heads=40,
        key_value_heads=8,
        head_dim=128,
        vocab=202_048,
        positions=4096 * 32,
        biased=attention_bias(config),
        qk_norm="unit" if config.flag("use_qk_norm", True) else "",
        wide_rotary=True,
        paired_rotary=True,
        no_rope_layers=frozenset(index for index in range(layers) if not rotated[index]),
        tempered=config.flag("attn_temperature_tuning", True),
        sliding_window=chunk,
        num_sliding_layers=config.num_sliding(
            [bool(each) for each in rotated[:layers]], "chunked_attention"
        ),
    )
    attention = tuple(linear for linear in shape.linears if linear.part == "attention")
    shape = replace(shape, intermediate_size=dense, linears=attention + _mlp(hidden, dense))
    if not mixtures:
        return shape
    experts = experts_of(
        config,
        mixtures,
        num=config.count("num_local_experts", 16),
        active=config.count("num_experts_per_tok", 1),
        intermediate_size=inner,
        router="every",
        shared=_mlp(hidden, inner),
    )
    return with_experts(shape, experts)


def _mlp(hidden: int, inner: int) -> tuple[LinearShape, ...]:
    return linear_shapes(
        ("gate_proj", hidden, inner, "mlp"),
        ("up_proj", hidden, inner, "mlp"),
        ("down_proj", inner, hidden, "mlp"),
        biased=(),
    )
