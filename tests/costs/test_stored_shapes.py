"""Every family's weights, as transformers writes them, against its own config and others."""

from __future__ import annotations

import pytest
from published import TINY

from thrifty.costs.shape import ModelShape
from thrifty.signals.weight_files import check_weights

WIDTHS = {
    "falcon": "ffn_hidden_size",
    "gpt2": "n_inner",
    "gpt_oss": "intermediate_size",
    "opt": "ffn_dim",
    "qwen2_moe": "shared_expert_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
"""The key of an mlp's width, where it is not ``intermediate_size``."""


@pytest.fixture(scope="module", params=TINY)
def stored(request, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(TINY[request.param])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return TINY[request.param], folder


def refusal(folder, config):
    with pytest.raises(ValueError, match="\nhint: ") as error:
        check_weights(folder, ModelShape.from_config(config))
    return str(error.value)


def test_weights_fit_their_own_config(stored):
    config, folder = stored
    assert check_weights(folder, ModelShape.from_config(config))


def test_another_depth(stored):
    config, folder = stored
    depth = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    deeper = config | {depth: config[depth] + 2}
    assert f"but the config says {config[depth] + 2}" in refusal(folder, deeper)


def test_another_mlp(stored):
    config, folder = stored
    assert "but the config says" in refusal(
        folder, config | {WIDTHS.get(config["model_type"], "intermediate_size"): 320}
    )


def test_other_heads(stored):
    config, folder = stored
    if config["model_type"] in ("gpt2", "gpt_neox", "opt"):
        return  # their matrices are the same for any number of heads
    if "kv_lora_rank" in config:
        other = {"num_attention_heads": 8, "num_key_value_heads": 8}
    elif config["model_type"] == "falcon":
        other = {"num_kv_heads": 4}
    else:
        other = {"num_key_value_heads": 2 if config.get("num_key_value_heads") == 1 else 1}
    assert "but the config says" in refusal(folder, config | other)


def test_other_experts(stored):
    config, folder = stored
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key in config:
            found = refusal(folder, config | {key: 2 * config[key]})
            assert f"but the config says {2 * config[key]}" in found
