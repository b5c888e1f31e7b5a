"""Multi-head latent attention and experts: DeepSeek V2 and V3, Moonlight, Kimi K2."""

from __future__ import annotations

from typing import Any

from thrifty.costs.families.config import Config, linear_shapes
from thrifty.costs.families.mixtures import experts_of, with_experts
from thrifty.costs.shape import Latent, ModelShape


def any_deepseek(
    config: Config,
    *,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    vocab: int,
    positions: int,
    first_dense: int,
    shared: int,
    expert: int,
    mlp_bias: bool = False,
    wide_rotary: bool = False,
    **routing: Any,
) -> ModelShape:
    """Dense in the first layers, experts in all others; the sizes given are the defaults."""
    hidden = config.count("hidden_size", hidden)
    heads = config.count("num_attention_heads", heads)
    layers = config.count("num_hidden_layers", layers)
    mlp = config.count("intermediate_size", mlp)
    if config.count("num_key_value_heads", heads, derived=True) != heads:
        config.fail("num_key_value_heads must equal num_attention_heads")
    # A null means that queries have no latent; only a missing key means the default.
    query_rank = config.values.get("q_lora_rank", 1536) and config.count("q_lora_rank", 1536)
    rank = config.count("kv_lora_rank", 512)
    rotated = config.count("qk_rope_head_dim", 64)
    plain = config.count("qk_nope_head_dim", 128)
    value = config.count("v_head_dim", 128)
    queries = heads * (plain + rotated)
    into_queries = (
        (
            ("q_a_proj", hidden, query_rank, "attention"),
            ("q_b_proj", query_rank, queries, "attention"),
        )
        if query_rank
        else (("q_proj", hidden, queries, "attention"),)
    )
    biased: tuple[str, ...] = ()
    if config.flag("attention_bias"):
        biased += ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    if mlp_bias:
        biased += ("gate_proj", "up_proj", "down_proj")
    shape = ModelShape(
        model_type=config.model_type,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=plain + rotated,
        intermediate_size=mlp,
        vocab_size=config.count("vocab_size", vocab),
        max_position_embeddings=config.count("max_position_embeddings", positions),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        dtype=config.dtype(),
        linears=linear_shapes(
            *into_queries,
            ("kv_a_proj_with_mqa", hidden, rank + rotated, "attention"),
            ("kv_b_proj", rank, heads * (plain + value), "attention"),
            ("o_proj", heads * value, hidden, "attention"),
            *_gated(hidden, mlp),
            biased=biased,
        ),
        latent=Latent(query_rank=query_rank or 0, rank=rank, value_dim=value),
        norm_parameters=hidden,
        embedding_size=hidden,
        activation=config.activation("hidden_act", "silu"),
        rotary_dim=rotated,
        wide_rotary=wide_rotary,
        paired_rotary=wide_rotary,
        attention_dropout=config.rate("attention_dropout", 0.0),
    )
    first = config.get("first_k_dense_replace", first_dense)
    if first >= layers:
        return shape
    inner = config.count("moe_intermediate_size", expert)
    both = inner * config.count("n_shared_experts", shared)
    experts = experts_of(
        config,
        range(first, layers),
        intermediate_size=inner,
        wide_weights=True,
        take_names=True,
        shared=linear_shapes(*_gated(hidden, both), biased=biased),
        **routing,
    )
    return with_experts(shape, experts)


def _gated(hidden: int, inner: int) -> tuple[tuple[str, int, int, str], ...]:
    return (
        ("gate_proj", hidden, inner, "mlp"),
        ("up_proj", hidden, inner, "mlp"),
        ("down_proj", inner, hidden, "mlp"),
    )


def deepseek_v2(config: Config) -> ModelShape:
    method = config.get("topk_method", "greedy")
    return any_deepseek(
        config,
        hidden=4096,
        mlp=11008,
        layers=32,
        heads=32,
        vocab=102_400,
        positions=2048,
        first_dense=0,
        shared=2,
        expert=1407,
        mlp_bias=config.flag("mlp_bias"),
        wide_rotary=True,
        num=config.count("n_routed_experts", 64, alias="num_experts"),
        # transformers has no default; 6 is what every published config says.
        active=config.count("num_experts_per_tok", 6),
        router="wide",
        groups=config.get("n_group", 0) if method == "group_limited_greedy" else 0,
        scaled=True,
    )


def deepseek_v3(config: Config) -> ModelShape:
    return any_deepseek(
        config,
        hidden=7168,
        mlp=18432,
        layers=61,
        heads=128,
        vocab=129_280,
        positions=4096,
        first_dense=3,
        shared=1,
        expert=2048,
        num=config.count("n_routed_experts", 256, alias="num_local_experts"),
        active=config.count("num_experts_per_tok", 8),
        router="sigmoid",
        groups=config.count("n_group", 8),
        scaled=True,
        normalised=config.flag("norm_topk_prob", True),
    )
