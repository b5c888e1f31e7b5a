"""How each model family spells its sizes: ``config.json`` -> ``ModelShape``.

One function a family. Keys that are missing take the default of the family's config class in
transformers 5.x, as ``AutoConfig`` does; counts that contradict each other are errors. Models of
several modalities are read for their text part alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def read(config: Mapping[str, Any]) -> ModelShape:
    """Raises ValueError for an unknown family, and for sizes that contradict each other."""
    model_type = config.get("model_type")
    if model_type in TEXT_PARTS:
        text = config.get("text_config") or {}
        model_type = TEXT_PARTS[model_type]
        config = {**text, "model_type": model_type}
    if model_type not in FAMILIES:
        what = f"model_type {model_type!r} is not supported" if model_type else "no model_type"
        raise ValueError(
            f"{what} in the model's config\n"
            "hint: `thrifty plan --measure` builds the model without weights and counts; with a "
            f"closed form are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type](Config(model_type, config))
