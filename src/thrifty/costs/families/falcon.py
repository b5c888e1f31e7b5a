"""Falcon: the multi-query 7B, the grouped 40B and 180B, and the RefinedWeb models with ALiBi."""

from __future__ import annotations

from thrifty.costs.families.config import Config, linear_shapes
from thrifty.costs.families.layer_normed import layer_normed
from thrifty.costs.shape import ModelShape

NAMES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def falcon(config: Config) -> ModelShape:
    hidden = config.count("hidden_size", 4544, alias="n_embed")
    heads = config.count("num_attention_heads", 71)
    mlp = config.count("ffn_hidden_size", 4 * hidden, derived=True)
    if config.rate("hidden_dropout", 0.0) or config.rate("attention_dropout", 0.0):
        config.fail("dropout is not supported")
    grouped, parallel = config.flag("new_decoder_architecture"), config.flag("parallel_attn", True)
    if grouped and not parallel:
        config.fail("new_decoder_architecture needs parallel_attn")
    alibi, single = config.flag("alibi"), not grouped and config.flag("multi_query", True)
    key_heads = heads
    if grouped:
        key_heads = config.count("num_kv_heads", heads, derived=True)
        if heads % key_heads:
            config.fail(f"{heads} attention heads are not a multiple of {key_heads} of keys")
    elif single:
        key_heads = 1
    two_norms = grouped and config.get("num_ln_in_parallel_attn", 2) == 2
    channels = hidden // heads
    return layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=65024,
        # Grouped keys and values are repeated to all heads at once, before the cache.
        groups=1 if single else heads,
        num_layers=config.count("num_hidden_layers", 32),
        max_position_embeddings=config.count("max_position_embeddings", 2048),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        linears=linear_shapes(
            ("query_key_value", hidden, (heads + 2 * key_heads) * channels, "attention"),
            ("dense", hidden, hidden, "attention"),
            ("dense_h_to_4h", hidden, mlp, "mlp"),
            ("dense_4h_to_h", mlp, hidden, "mlp"),
            biased=NAMES if config.flag("bias") else (),
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        block="parallel" if two_norms else "shared" if parallel else "pre",
        activation=config.activation("activation", "gelu"),
        rotary_dim=0 if alibi else channels,
        # sdpa has no fused kernel for one head of keys that is not repeated.
        attention="math" if single else "sdpa",
        bias_apart=True,
        splits="copies" if grouped and key_heads < heads else "keys" if single or grouped else "",
        mask="alibi" if alibi else "given",
    )
