"""How each model family spells its sizes: ``config.json`` -> ``ModelShape``.

One function a family. Keys that are missing take the default of the family's config class in
transformers 5.x, as ``AutoConfig`` does, and ``notes`` names them; what contradicts itself is an
error. Models of several modalities are read for their text part alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from thrifty.costs.families import (
    falcon,
    gated,
    gemma,
    latent,
    layer_normed,
    llama4,
    mixtures,
    olmo,
)
from thrifty.costs.families.config import Config
from thrifty.costs.shape import ModelShape

TEXT_PARTS = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
"""Model type of a model with a text part -> that of the part."""

FAMILIES: dict[str, Callable[[Config], ModelShape]] = {
    "llama": gated.llama,
    "smollm3": gated.smollm3,
    "mistral": gated.mistral,
    "qwen2": gated.qwen2,
    "qwen3": gated.qwen3,
    "phi3": gated.phi3,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "olmo": olmo.olmo,
    "olmo2": olmo.olmo2,
    "olmo3": olmo.olmo3,
    "mixtral": mixtures.mixtral,
    "qwen2_moe": mixtures.qwen2_moe,
    "qwen3_moe": mixtures.qwen3_moe,
    "deepseek_v2": latent.deepseek_v2,
    "deepseek_v3": latent.deepseek_v3,
    "phi": layer_normed.phi,
    "gpt2": layer_normed.gpt2,
    "gpt_neox": layer_normed.gpt_neox,
    "opt": layer_normed.opt,
    "falcon": falcon.falcon,
    "gpt_oss": mixtures.gpt_oss,
    "llama4_text": llama4.llama4_text,
    "starcoder2": layer_normed.starcoder2,
}

SIZES = {
    *("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_kv_heads"),
    *("intermediate_size", "intermediate_size_mlp", "ffn_dim", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts"),
    *("n_shared_experts", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("num_experts_per_tok", "n_positions"),
}
"""Keys that decide how many weights a model has, or how many of them a token goes through."""


def read(config: Mapping[str, Any]) -> ModelShape:
    """Raises ValueError for an unknown family, and for sizes that contradict each other."""
    return _read(_text_part(config))


def notes(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config leaves open or says of other things than its sizes, a line each."""
    text = _text_part(config)
    _read(text)
    taken = {key: value for key, value in text.defaults.items() if key in SIZES}
    if taken:
        values = ", ".join(f"{key} {value}" for key, value in taken.items())
        yield (
            f"config.json lacks {', '.join(taken)}: priced with the defaults of transformers, "
            f"{values}"
        )
    stored = config.get("quantization_config") or text.values.get("quantization_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        yield (
            f"config.json says that the weights are stored quantised ({method or 'by what: unsaid'}"
            "): they are priced whole, in the plan's dtype; --using nf4 or int8 prices fewer bits"
        )
    named = config.get("architectures")
    other = [name for name in named or () if not _is_of(name, str(config.get("model_type")))]
    if other:
        yield (
            f"config.json names {', '.join(map(str, other))} but model_type {config['model_type']}"
            ": transformers goes by the model_type, and so does the plan"
        )


def _is_of(architecture: Any, model_type: str) -> bool:
    """``Qwen2MoeForCausalLM`` is of ``qwen2_moe``, and not of ``qwen2``."""
    family = model_type.replace("_", "").removesuffix("text")
    ends = ("for", "lmhead", "model")
    return str(architecture).lower().startswith(tuple(family + end for end in ends))


def _text_part(config: Mapping[str, Any]) -> Config:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in TEXT_PARTS:
        text = config.get("text_config") or {}
        if not isinstance(text, Mapping):
            Config(model_type, config).fail(f"text_config must be an object, not {text!r}")
        model_type = TEXT_PARTS[model_type]
        config = {**text, "model_type": model_type}
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if not model_type:
            raise ValueError(
                "no model_type in the model's config\nhint: compare with the published config.json"
            )
        raise ValueError(
            f"model_type {model_type!r} is not supported in the model's config\n"
            "hint: `thrifty plan --measure` builds the model without weights and counts; with a "
            f"closed form are {', '.join(sorted(FAMILIES))}"
        )
    return Config(model_type, config)


def _read(config: Config) -> ModelShape:
    shape = FAMILIES[config.model_type](config)
    config.layer_types(shape.num_layers)
    return shape
