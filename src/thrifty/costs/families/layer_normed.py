"""Decoders with LayerNorm and a plain mlp: GPT-2 and its kin."""

from __future__ import annotations

from typing import Any

from thrifty.costs.families.config import Config, linear_shapes
from thrifty.costs.shape import ModelShape


def layer_normed(config: Config, hidden: int, heads: int, mlp: int, **fields: Any) -> ModelShape:
    """A decoder with LayerNorm and a plain mlp; as many key-value heads as heads unless given."""
    if hidden % heads:
        config.fail(f"hidden size {hidden} is not a multiple of {heads} attention heads")
    return ModelShape(
        model_type=config.model_type,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=fields.pop("groups", heads),
        head_dim=hidden // heads,
        intermediate_size=mlp,
        vocab_size=config.count("vocab_size", fields.pop("vocab")),
        dtype=config.dtype(),
        norm="layer",
        gated=False,
        **fields,
    )


def gpt2(config: Config) -> ModelShape:
    hidden = config.count("n_embd", 768, alias="hidden_size")
    heads = config.count("n_head", 12, alias="num_attention_heads")
    mlp = config.count("n_inner", 4 * hidden, derived=True)
    positions = config.count("n_positions", 1024, alias="max_position_embeddings")
    if config.flag("add_cross_attention"):
        config.fail("add_cross_attention is not supported")
    return layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=50257,
        num_layers=config.count("n_layer", 12, alias="num_hidden_layers"),
        max_position_embeddings=positions,
        num_positions=positions,
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        linears=linear_shapes(
            ("c_attn", hidden, 3 * hidden, "attention"),
            ("c_proj", hidden, hidden, "attention"),
            ("c_fc", hidden, mlp, "mlp"),
            ("c_proj", mlp, hidden, "mlp"),
            biased=("c_attn", "c_proj", "c_fc"),
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        activation=config.activation("activation_function", "gelu_new"),
        dropout=config.rate("resid_pdrop", 0.1),
        embedding_dropout=config.rate("embd_pdrop", 0.1),
        attention_dropout=config.rate("attn_pdrop", 0.1),
    )


def gpt_neox(config: Config) -> ModelShape:
    hidden = config.count("hidden_size", 6144)
    heads = config.count("num_attention_heads", 64)
    mlp = config.count("intermediate_size", 24576)
    biased: tuple[str, ...] = ("dense_h_to_4h", "dense_4h_to_h")
    if config.flag("attention_bias", True):
        biased += ("query_key_value", "dense")
    return layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=50432,
        num_layers=config.count("num_hidden_layers", 44),
        max_position_embeddings=config.count("max_position_embeddings", 2048),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        linears=linear_shapes(
            ("query_key_value", hidden, 3 * hidden, "attention"),
            ("dense", hidden, hidden, "attention"),
            ("dense_h_to_4h", hidden, mlp, "mlp"),
            ("dense_4h_to_h", mlp, hidden, "mlp"),
            biased=biased,
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        block="parallel" if config.flag("use_parallel_residual", True) else "pre",
        activation=config.activation("hidden_act", "gelu"),
        rotary_dim=config.rotary_dim(hidden // heads, "rotary_pct", 0.25),
        dropout=config.rate("hidden_dropout", 0.0),
        embedding_dropout=config.rate("hidden_dropout", 0.0),
        attention_dropout=config.rate("attention_dropout", 0.0),
    )


def opt(config: Config) -> ModelShape:
    hidden = config.count("hidden_size", 768)
    heads = config.count("num_attention_heads", 12)
    mlp = config.count("ffn_dim", 3072)
    positions = config.count("max_position_embeddings", 2048)
    before = config.flag("do_layer_norm_before", True)
    names = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")
    return layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=50272,
        num_layers=config.count("num_hidden_layers", 12),
        max_position_embeddings=positions,
        # OPT offsets its positions by 2.
        num_positions=positions + 2,
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        linears=linear_shapes(
            ("q_proj", hidden, hidden, "attention"),
            ("k_proj", hidden, hidden, "attention"),
            ("v_proj", hidden, hidden, "attention"),
            ("out_proj", hidden, hidden, "attention"),
            ("fc1", hidden, mlp, "mlp"),
            ("fc2", mlp, hidden, "mlp"),
            biased=names if config.flag("enable_bias", True) else (),
        ),
        norm_parameters=2 * hidden if config.flag("layer_norm_elementwise_affine", True) else 0,
        embedding_size=config.count("word_embed_proj_dim", hidden, derived=True),
        block="pre" if before else "post",
        final_norm=before and not config.flag("_remove_final_layer_norm"),
        activation=config.activation("activation_function", "relu"),
        mask="given",
        dropout=config.rate("dropout", 0.1),
        attention_dropout=config.rate("attention_dropout", 0.0),
    )


def starcoder2(config: Config) -> ModelShape:
    layers = config.count("num_hidden_layers", 30)
    window = config.window(0)
    return _separate(
        config,
        ("o_proj", "c_fc", "c_proj"),
        biased=config.flag("use_bias", True),
        hidden=3072,
        heads=24,
        groups=2,
        mlp=12288,
        vocab=49152,
        layers=layers,
        positions=4096,
        tied=True,
        rotated=1.0,
        activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
        sliding_window=window,
        num_sliding_layers=layers if window else 0,
        dropout=config.rate("residual_dropout", 0.0),
        embedding_dropout=config.rate("embedding_dropout", 0.0),
    )


def phi(config: Config) -> ModelShape:
    """Phi 1, 1.5 and 2."""
    if config.flag("qk_layernorm"):
        config.fail("qk_layernorm is not supported")
    return _separate(
        config,
        ("dense", "fc1", "fc2"),
        biased=True,
        hidden=2048,
        heads=32,
        mlp=8192,
        vocab=51200,
        layers=24,
        positions=2048,
        tied=False,
        rotated=0.5,
        activation=config.activation("hidden_act", "gelu_new"),
        head_bias=True,
        block="shared",
        dropout=config.rate("resid_pdrop", 0.0),
        embedding_dropout=config.rate("embd_pdrop", 0.0),
    )


def _separate(
    config: Config,
    names: tuple[str, str, str],
    *,
    biased: bool,
    hidden: int,
    heads: int,
    mlp: int,
    vocab: int,
    layers: int,
    positions: int,
    tied: bool,
    rotated: float,
    groups: int = 0,
    **switches: Any,
) -> ModelShape:
    """Rotary, with products of their own for queries, keys and values; ``names`` are those of the
    attention's output and of the mlp. The sizes given are the defaults for missing keys."""
    hidden = config.count("hidden_size", hidden)
    heads = config.count("num_attention_heads", heads)
    groups = config.count("num_key_value_heads", groups or heads, derived=not groups)
    mlp = config.count("intermediate_size", mlp)
    if heads % groups:
        config.fail(f"{heads} attention heads are not a multiple of {groups} key-value heads")
    keys = groups * (hidden // heads)
    out, into, down = names
    return layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=vocab,
        groups=groups,
        num_layers=config.count("num_hidden_layers", layers),
        max_position_embeddings=config.count("max_position_embeddings", positions),
        tie_word_embeddings=config.flag("tie_word_embeddings", tied),
        linears=linear_shapes(
            ("q_proj", hidden, hidden, "attention"),
            ("k_proj", hidden, keys, "attention"),
            ("v_proj", hidden, keys, "attention"),
            (out, hidden, hidden, "attention"),
            (into, hidden, mlp, "mlp"),
            (down, mlp, hidden, "mlp"),
            biased=("q_proj", "k_proj", "v_proj", *names) if biased else (),
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        rotary_dim=config.rotary_dim(hidden // heads, "partial_rotary_factor", rotated),
        attention_dropout=config.rate("attention_dropout", 0.0),
        **switches,
    )
