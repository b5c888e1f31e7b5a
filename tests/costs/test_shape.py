"""ModelShape against the models that transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from published import PUBLISHED, TINY, VARIANTS
from releases import PARAMETERS, RELEASES

from thrifty.costs import families
from thrifty.costs.families.config import ACTIVATIONS
from thrifty.costs.shape import ModelShape, read_shape

UNCOUNTED = {name: config for name, config in RELEASES.items() if name not in PARAMETERS}
ALL = PUBLISHED | UNCOUNTED | TINY | VARIANTS


def build(config):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields)
        )


@pytest.mark.parametrize("name", ALL)
def test_parameters_equal_the_model(name):
    shape, model = ModelShape.from_config(ALL[name]), build(ALL[name])
    assert shape.num_parameters == model.num_parameters()
    assert sum(shape.parameters_by_part.values()) == shape.num_parameters
    config = model.config
    for field in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        theirs = getattr(config, {"num_layers": "num_hidden_layers"}.get(field, field))
        assert getattr(shape, field) == theirs, field


@pytest.mark.parametrize("name", TINY | VARIANTS)
def test_linears_are_those_of_a_layer(name):
    import torch
    from transformers.pytorch_utils import Conv1D

    shape, model = ModelShape.from_config(ALL[name]), build(ALL[name])
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    found = {}
    for path, module in layer.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and not path.endswith("router"):
            size = tuple(module.weight.shape)
            name, bias = path.rsplit(".", 1)[-1], module.bias is not None
            found[name, size if isinstance(module, Conv1D) else size[::-1], bias] = path
    assert found.keys() == {
        (x.name, (x.in_features, x.out_features), x.bias) for x in shape.linears_of(0)
    }
    for linear in shape.linears_of(0):
        path = found[linear.name, (linear.in_features, linear.out_features), linear.bias]
        mlp = "mlp" in path or path.startswith(("fc", "feed_forward"))
        assert (linear.part == "mlp") == mlp, path


@pytest.mark.parametrize("family", TINY)
def test_missing_keys_take_the_defaults_of_transformers(family):
    from transformers import AutoConfig

    bare = ModelShape.from_config({"model_type": family})
    full = ModelShape.from_config(AutoConfig.for_model(family).to_dict())
    assert bare == full


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-3-1B", "GPT-2", "Pythia-160m", "OPT-350m"])
def test_saved_configs_read_the_same(name, tmp_path):
    model = build(PUBLISHED[name] | {"num_hidden_layers": 1, "n_layer": 1})
    model.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_parameters == model.num_parameters()
    assert read_shape(tmp_path / "config.json") == shape


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    assert ModelShape.from_config((PUBLISHED | RELEASES)[name]).num_parameters == PARAMETERS[name]


def test_parts_of_a_known_model():
    parts = ModelShape.from_config(PUBLISHED["Llama-3-8B"]).parameters_by_part
    assert parts == {
        "embedding": 128256 * 4096,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "mlp": 32 * 3 * 4096 * 14336,
        "experts": 0,
        "norms": 65 * 4096,
        "head": 128256 * 4096,
    }


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_models_of_several_modalities_are_read_for_their_text(family):
    text = TINY[f"{family}_text"]
    wrapped = ModelShape.from_config({"model_type": family, "text_config": text})
    assert wrapped == ModelShape.from_config(text)


def test_lora_targets_are_the_linears():
    shape = ModelShape.from_config(TINY["gpt2"])
    assert shape.lora_targets == ("c_attn", "c_proj", "c_fc")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "closed form are deepseek_v2, deepseek_v3, falcon, gemma"),
        ({}, "no model_type"),
        (TINY["llama"] | {"num_key_value_heads": 3}, "not a multiple of 3 key-value heads"),
        (TINY["llama"] | {"hidden_size": 66}, "not a multiple of 4 attention heads"),
        (TINY["llama"] | {"hidden_size": "64"}, "whole number above 0"),
        (TINY["llama"] | {"vocab_size": 0}, "whole number above 0"),
        (TINY["llama"] | {"torch_dtype": "int4"}, "dtype 'int4'"),
        (TINY["opt"] | {"dropout": 2}, "from 0 up to 1"),
        (TINY["gemma2"] | {"layer_types": ["full_attention"]}, "1 are named"),
        (TINY["qwen3"] | {"layer_types": ["full_attention"] * 3}, "each of the 2 layers: 3 are"),
        (TINY["llama"] | {"layer_types": ["full_attention"]}, "layer_types"),
        (TINY["llama"] | {"layer_types": ["full_attention", "conv"]}, "holds 'conv'"),
        (TINY["llama"] | {"hidden_size": None}, "hidden_size must be a whole number"),
        (TINY["gpt2"] | {"n_layer": None}, "n_layer must be a whole number"),
        (TINY["mixtral"] | {"num_local_experts": None}, "num_local_experts must be"),
        (TINY["llama"] | {"tie_word_embeddings": "yes"}, "must be true or false, not 'yes'"),
        (TINY["llama"] | {"tie_word_embeddings": None}, "must be true or false, not None"),
        (TINY["opt"] | {"enable_bias": 1}, "must be true or false, not 1"),
        (TINY["llama"] | {"hidden_act": "sillu"}, "hidden_act 'sillu' .*\nhint: did you mean silu"),
        (TINY["gpt2"] | {"activation_function": None}, "activation_function None is not supported"),
        (TINY["llama"] | {"rope_parameters": "linear"}, "rope_parameters must be an object"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config must be an object"),
        ({"model_type": ["llama"]}, "is not supported"),
    ],
)
def test_bad_configs_are_clear_errors(config, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelShape.from_config(config)
    assert "\nhint: " in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"tie_word_embeddings": "yes"},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention"] * 3},
        {"hidden_act": "sillu"},
        {"attention_bias": None},
    ],
    ids=str,
)
def test_what_is_refused_cannot_be_built_either(change):
    from huggingface_hub.errors import StrictDataclassError

    config = TINY["llama"] | change
    with pytest.raises(ValueError):
        ModelShape.from_config(config)
    with pytest.raises((StrictDataclassError, KeyError)):
        build(config)


def test_the_activations_are_those_of_transformers():
    from transformers.activations import ACT2FN

    weighted = {name for name in ACT2FN if list(ACT2FN[name].parameters())}
    assert set(ACT2FN) - weighted == ACTIVATIONS


def test_a_complete_config_needs_no_note():
    for name in ("Llama-3-8B", "Qwen3-30B-A3B", "Gemma-2-2B", "OPT-350m", "Phi-3-mini", "GPT-2"):
        assert not list(families.notes(PUBLISHED[name])), name


@pytest.mark.parametrize(
    ("family", "key", "default"),
    [
        ("llama", "hidden_size", 4096),
        ("llama", "num_hidden_layers", 32),
        ("llama", "intermediate_size", 11008),
        ("llama", "vocab_size", 32000),
        ("gemma2", "num_key_value_heads", 4),
        ("gpt2", "n_layer", 12),
        ("opt", "ffn_dim", 3072),
        ("gemma3_text", "head_dim", 256),
        ("mixtral", "num_local_experts", 8),
        ("deepseek_v3", "n_routed_experts", 256),
    ],
)
def test_a_size_taken_by_default_is_noted(family, key, default):
    config = {name: value for name, value in TINY[family].items() if name != key}
    assert not any(key in note for note in families.notes(TINY[family]))
    (note,) = [note for note in families.notes(config) if key in note]
    assert f"{key} {default}" in note


def test_sizes_that_follow_from_others_are_not_noted():
    config = {k: v for k, v in TINY["llama"].items() if k != "num_key_value_heads"}
    assert not list(families.notes(config))
    assert not list(families.notes(TINY["llama"] | {"num_key_value_heads": None}))


def test_quantised_weights_and_other_architectures_are_noted():
    config = TINY["qwen2"] | {"architectures": ["Qwen2ForCausalLM"]}
    assert not list(families.notes(config))
    (note,) = families.notes(config | {"quantization_config": {"quant_method": "gptq"}})
    assert "stored quantised (gptq)" in note
    (note,) = families.notes(config | {"architectures": ["Qwen2MoeForCausalLM"]})
    assert "names Qwen2MoeForCausalLM but model_type qwen2" in note
    wrapped = {"model_type": "gemma3", "text_config": TINY["gemma3_text"]}
    wrapped["architectures"] = ["Gemma3ForConditionalGeneration"]
    assert not list(families.notes(wrapped))


@pytest.mark.parametrize("family", TINY)
def test_the_architecture_that_transformers_writes_is_the_model_types_own(family):
    name = type(build(TINY[family])).__name__
    notes = families.notes(TINY[family] | {"architectures": [name]})
    assert not any("names" in note for note in notes)


def test_unreadable_files_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="hint: give the folder"):
        read_shape(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="holds no object"):
        read_shape(tmp_path)


def test_the_floor_loads_no_torch():
    code = (
        "import sys; import thrifty.costs.shape, thrifty.costs.flops, thrifty.costs.memory;"
        "import thrifty.costs.hardware, thrifty.costs.time;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
