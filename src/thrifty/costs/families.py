"""How each model family spells its sizes: ``config.json`` -> ``ModelShape``.

One function a family. Keys that are missing take the default of the family's config class in
transformers 5.x, as ``AutoConfig`` does; counts that contradict each other are errors. ``gemma3``
is read for its text part alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from thrifty.costs.shape import ITEMSIZE, LinearShape, ModelShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def read(config: Mapping[str, Any]) -> ModelShape:
    model_type = config.get("model_type")
    if model_type == "gemma3":
        text = config.get("text_config") or {}
        model_type = "gemma3_text"
        config = {**text, "model_type": model_type}
    if model_type not in FAMILIES:
        what = f"model_type {model_type!r} is not supported" if model_type else "no model_type"
        raise ValueError(
            f"{what} in the model's config\nhint: supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type](_Config(model_type, config))


class _Config:
    """A config dict that checks what it hands out."""

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self.model_type = model_type
        self.values = values

    def fail(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.model_type} config: {what}\nhint: compare with the published config.json"
        )

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int, alias: str = "") -> int:
        key = alias if name not in self.values and alias in self.values else name
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"{key} must be a whole number above 0, not {value!r}")
        return value

    def rate(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.fail(f"{name} must be from 0 up to 1, not {value!r}")
        return float(value)

    def window(self, default: int) -> int:
        """The sliding window, 0 for none. Here a null means none; only a missing key means the
        default."""
        value = self.values.get("sliding_window", default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self.fail(f"sliding_window must be a whole number or null, not {value!r}")
        return value or 0

    def dtype(self) -> str:
        # transformers 5 writes "dtype"; before it was "torch_dtype".
        name = str(self.get("dtype", self.get("torch_dtype", "float32"))).removeprefix("torch.")
        if name not in ITEMSIZE:
            self.fail(f"dtype {name!r} is none of {', '.join(ITEMSIZE)}")
        return name

    def rotary_dim(self, head_dim: int, legacy: str, share: float) -> int:
        """Rotated channels; 5.x keeps the share in rope_parameters, before it was on its own."""
        rope = self.get("rope_parameters", {})
        share = self.get(legacy, share)
        return int(head_dim * rope.get("partial_rotary_factor", share))

    def num_sliding(self, sliding: Sequence[bool]) -> int:
        """Layers with a sliding window: as ``layer_types`` says, otherwise by the family's rule."""
        types = self.get("layer_types")
        if types is None:
            return sum(sliding)
        if not isinstance(types, list) or len(types) < len(sliding):
            self.fail(f"layer_types must name each of the {len(sliding)} layers")
        return sum(kind == "sliding_attention" for kind in types[: len(sliding)])


def _linears(*sizes: tuple[str, int, int, str], biased: Sequence[str]) -> tuple[LinearShape, ...]:
    return tuple(
        LinearShape(name=name, in_features=i, out_features=o, part=part, bias=name in biased)
        for name, i, o, part in sizes
    )


def _gated(
    config: _Config,
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
    hidden = config.count("hidden_size", hidden)
    heads = config.count("num_attention_heads", heads)
    groups = config.count("num_key_value_heads", key_value_heads or heads)
    mlp = config.count("intermediate_size", mlp)
    if heads % groups:
        config.fail(f"{heads} attention heads are not a multiple of {groups} key-value heads")
    if hidden % heads and not head_dim and config.get("head_dim") is None:
        config.fail(f"hidden_size {hidden} is not a multiple of {heads} attention heads")
    head_dim = config.count("head_dim", head_dim or hidden // heads)
    queries, keys = heads * head_dim, groups * head_dim
    if fused:
        linears = _linears(
            ("qkv_proj", hidden, queries + 2 * keys, "attention"),
            ("o_proj", queries, hidden, "attention"),
            ("gate_up_proj", hidden, 2 * mlp, "mlp"),
            ("down_proj", mlp, hidden, "mlp"),
            biased=biased,
        )
    else:
        linears = _linears(
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
        tie_word_embeddings=bool(config.get("tie_word_embeddings", tied)),
        dtype=config.dtype(),
        linears=linears,
        norm_parameters=hidden,
        embedding_size=hidden,
        rotary_dim=config.rotary_dim(head_dim, "partial_rotary_factor", 1.0),
        attention_dropout=config.rate("attention_dropout", 0.0),
        **{"activation": config.get("hidden_act", "silu"), **switches},
    )


def _attention_bias(config: _Config) -> tuple[str, ...]:
    return ATTENTION if config.get("attention_bias") else ()


def _llama(config: _Config) -> ModelShape:
    return _gated(config, biased=_attention_bias(config) + (MLP if config.get("mlp_bias") else ()))


def _mistral(config: _Config) -> ModelShape:
    window = config.window(4096)
    return _gated(
        config,
        mlp=14336,
        key_value_heads=8,
        positions=4096 * 32,
        sliding_window=window,
        num_sliding_layers=config.count("num_hidden_layers", 32) if window else 0,
    )


def _qwen(config: _Config, **switches: Any) -> ModelShape:
    window = config.window(4096) if config.get("use_sliding_window") else 0
    first = config.get("max_window_layers", 28)
    sliding = [index >= first for index in range(config.count("num_hidden_layers", 32))]
    return _gated(
        config,
        mlp=22016,
        key_value_heads=32,
        vocab=151936,
        positions=32768,
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
        **switches,
    )


def _qwen2(config: _Config) -> ModelShape:
    return _qwen(config, biased=ATTENTION[:3])


def _qwen3(config: _Config) -> ModelShape:
    return _qwen(config, head_dim=128, biased=_attention_bias(config), qk_norm="head")


def _gemma(config: _Config, *, period: int, softcap: float | None, **switches: Any) -> ModelShape:
    """Every ``period``-th layer attends to all, the others to a window."""
    window = config.window(4096)
    sliding = [(index + 1) % period != 0 for index in range(config.count("num_hidden_layers", 26))]
    return _gated(
        config,
        hidden=2304,
        mlp=9216,
        layers=26,
        heads=8,
        key_value_heads=4,
        head_dim=256,
        tied=True,
        biased=_attention_bias(config),
        norm="wide",
        scaled_embedding=True,
        block="sandwich",
        activation=config.get("hidden_activation", "gelu_pytorch_tanh"),
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
        logit_softcap=config.values.get("final_logit_softcapping", softcap) is not None,
        **switches,
    )


def _gemma1(config: _Config) -> ModelShape:
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    return _gated(
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
        biased=_attention_bias(config),
        norm="wide",
        scaled_embedding=True,
        # "gelu" in the first releases' configs means the tanh form, and transformers reads it so.
        activation="gelu_pytorch_tanh" if activation == "gelu" else activation,
    )


def _gemma2(config: _Config) -> ModelShape:
    return _gemma(
        config,
        period=2,
        softcap=30.0,
        vocab=256_000,
        positions=8192,
        attention="eager",
        attention_softcap=config.values.get("attn_logit_softcapping", 50.0) is not None,
    )


def _gemma3(config: _Config) -> ModelShape:
    period = config.get("sliding_window_pattern", 6)
    return _gemma(
        config,
        period=period,
        softcap=None,
        vocab=262_208,
        positions=131_072,
        qk_norm="head",
        rotary_per_kind=True,
    )


def _olmo(config: _Config, **switches: Any) -> ModelShape:
    fields = {"norm": "bare", "clips": config.get("clip_qkv") is not None, **switches}
    biased = _attention_bias(config)
    return _gated(config, vocab=50304, biased=biased, wide_rotary=True, **fields)


def _olmo1(config: _Config) -> ModelShape:
    return replace(_olmo(config), norm_parameters=0)


def _olmo2(config: _Config, **switches: Any) -> ModelShape:
    return _olmo(config, norm="wide", block="branch", qk_norm="all", clips=False, **switches)


def _olmo3(config: _Config) -> ModelShape:
    window = config.window(4096)
    sliding = [(index + 1) % 4 != 0 for index in range(config.count("num_hidden_layers", 32))]
    return _olmo2(
        config,
        rotary_per_kind=True,
        sliding_window=window,
        num_sliding_layers=config.num_sliding(sliding) if window else 0,
    )


def _smollm3(config: _Config) -> ModelShape:
    """Every fourth layer has no rotary embedding, which only its liveness would show."""
    layers = config.count("num_hidden_layers", 36)
    window = config.window(0) if config.get("use_sliding_window") else 0
    every = config.count("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers", [(index + 1) % every for index in range(layers)])
    return _gated(
        config,
        hidden=2048,
        layers=36,
        heads=16,
        key_value_heads=4,
        vocab=128_256,
        positions=32768,
        tied=True,
        biased=_attention_bias(config) + (MLP if config.get("mlp_bias") else ()),
        sliding_window=window,
        num_sliding_layers=config.num_sliding([not each for each in rotated]) if window else 0,
    )


def _phi3(config: _Config) -> ModelShape:
    window = config.window(0)
    return _gated(
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


def _layer_normed(config: _Config, hidden: int, heads: int, mlp: int, **fields: Any) -> ModelShape:
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


def _gpt2(config: _Config) -> ModelShape:
    hidden = config.count("n_embd", 768, alias="hidden_size")
    heads = config.count("n_head", 12, alias="num_attention_heads")
    mlp = config.count("n_inner", 4 * hidden)
    positions = config.count("n_positions", 1024, alias="max_position_embeddings")
    if config.get("add_cross_attention"):
        config.fail("add_cross_attention is not supported")
    return _layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=50257,
        num_layers=config.count("n_layer", 12, alias="num_hidden_layers"),
        max_position_embeddings=positions,
        num_positions=positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        linears=_linears(
            ("c_attn", hidden, 3 * hidden, "attention"),
            ("c_proj", hidden, hidden, "attention"),
            ("c_fc", hidden, mlp, "mlp"),
            ("c_proj", mlp, hidden, "mlp"),
            biased=("c_attn", "c_proj", "c_fc"),
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        activation=config.get("activation_function", "gelu_new"),
        dropout=config.rate("resid_pdrop", 0.1),
        embedding_dropout=config.rate("embd_pdrop", 0.1),
        attention_dropout=config.rate("attn_pdrop", 0.1),
    )


def _gpt_neox(config: _Config) -> ModelShape:
    hidden = config.count("hidden_size", 6144)
    heads = config.count("num_attention_heads", 64)
    mlp = config.count("intermediate_size", 24576)
    biased: tuple[str, ...] = ("dense_h_to_4h", "dense_4h_to_h")
    if config.get("attention_bias", True):
        biased += ("query_key_value", "dense")
    return _layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=50432,
        num_layers=config.count("num_hidden_layers", 44),
        max_position_embeddings=config.count("max_position_embeddings", 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        linears=_linears(
            ("query_key_value", hidden, 3 * hidden, "attention"),
            ("dense", hidden, hidden, "attention"),
            ("dense_h_to_4h", hidden, mlp, "mlp"),
            ("dense_4h_to_h", mlp, hidden, "mlp"),
            biased=biased,
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        block="parallel" if config.get("use_parallel_residual", True) else "pre",
        activation=config.get("hidden_act", "gelu"),
        rotary_dim=config.rotary_dim(hidden // heads, "rotary_pct", 0.25),
        dropout=config.rate("hidden_dropout", 0.0),
        embedding_dropout=config.rate("hidden_dropout", 0.0),
        attention_dropout=config.rate("attention_dropout", 0.0),
    )


def _opt(config: _Config) -> ModelShape:
    hidden = config.count("hidden_size", 768)
    heads = config.count("num_attention_heads", 12)
    mlp = config.count("ffn_dim", 3072)
    positions = config.count("max_position_embeddings", 2048)
    before = bool(config.get("do_layer_norm_before", True))
    names = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")
    return _layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=50272,
        num_layers=config.count("num_hidden_layers", 12),
        max_position_embeddings=positions,
        # OPT offsets its positions by 2.
        num_positions=positions + 2,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        linears=_linears(
            ("q_proj", hidden, hidden, "attention"),
            ("k_proj", hidden, hidden, "attention"),
            ("v_proj", hidden, hidden, "attention"),
            ("out_proj", hidden, hidden, "attention"),
            ("fc1", hidden, mlp, "mlp"),
            ("fc2", mlp, hidden, "mlp"),
            biased=names if config.get("enable_bias", True) else (),
        ),
        norm_parameters=2 * hidden if config.get("layer_norm_elementwise_affine", True) else 0,
        embedding_size=config.count("word_embed_proj_dim", hidden),
        block="pre" if before else "post",
        final_norm=before and not config.get("_remove_final_layer_norm", False),
        activation=config.get("activation_function", "relu"),
        dropout=config.rate("dropout", 0.1),
        attention_dropout=config.rate("attention_dropout", 0.0),
    )


def _starcoder2(config: _Config) -> ModelShape:
    hidden = config.count("hidden_size", 3072)
    heads = config.count("num_attention_heads", 24)
    groups = config.count("num_key_value_heads", 2)
    mlp = config.count("intermediate_size", 12288)
    if heads % groups:
        config.fail(f"{heads} attention heads are not a multiple of {groups} key-value heads")
    keys = groups * (hidden // heads)
    layers = config.count("num_hidden_layers", 30)
    window = config.window(0)
    names = (*ATTENTION, "c_fc", "c_proj")
    return _layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=49152,
        groups=groups,
        num_layers=layers,
        max_position_embeddings=config.count("max_position_embeddings", 4096),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        linears=_linears(
            ("q_proj", hidden, hidden, "attention"),
            ("k_proj", hidden, keys, "attention"),
            ("v_proj", hidden, keys, "attention"),
            ("o_proj", hidden, hidden, "attention"),
            ("c_fc", hidden, mlp, "mlp"),
            ("c_proj", mlp, hidden, "mlp"),
            biased=names if config.get("use_bias", True) else (),
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        activation=config.get("hidden_act", "gelu_pytorch_tanh"),
        rotary_dim=config.rotary_dim(hidden // heads, "partial_rotary_factor", 1.0),
        sliding_window=window,
        num_sliding_layers=layers if window else 0,
        dropout=config.rate("residual_dropout", 0.0),
        embedding_dropout=config.rate("embedding_dropout", 0.0),
        attention_dropout=config.rate("attention_dropout", 0.0),
    )


def _phi(config: _Config) -> ModelShape:
    """Phi 1, 1.5 and 2."""
    hidden = config.count("hidden_size", 2048)
    heads = config.count("num_attention_heads", 32)
    groups = config.count("num_key_value_heads", heads)
    mlp = config.count("intermediate_size", 8192)
    if heads % groups:
        config.fail(f"{heads} attention heads are not a multiple of {groups} key-value heads")
    if config.get("qk_layernorm"):
        config.fail("qk_layernorm is not supported")
    keys = groups * (hidden // heads)
    return _layer_normed(
        config,
        hidden,
        heads,
        mlp,
        vocab=51200,
        groups=groups,
        num_layers=config.count("num_hidden_layers", 24),
        max_position_embeddings=config.count("max_position_embeddings", 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        linears=_linears(
            ("q_proj", hidden, hidden, "attention"),
            ("k_proj", hidden, keys, "attention"),
            ("v_proj", hidden, keys, "attention"),
            ("dense", hidden, hidden, "attention"),
            ("fc1", hidden, mlp, "mlp"),
            ("fc2", mlp, hidden, "mlp"),
            biased=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        ),
        norm_parameters=2 * hidden,
        embedding_size=hidden,
        head_bias=True,
        block="shared",
        activation=config.get("hidden_act", "gelu_new"),
        rotary_dim=config.rotary_dim(hidden // heads, "partial_rotary_factor", 0.5),
        dropout=config.rate("resid_pdrop", 0.0),
        embedding_dropout=config.rate("embd_pdrop", 0.0),
        attention_dropout=config.rate("attention_dropout", 0.0),
    )


FAMILIES = {
    "llama": _llama,
    "smollm3": _smollm3,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma1,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "olmo": _olmo1,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "starcoder2": _starcoder2,
}
