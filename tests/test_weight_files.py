"""Weights that disagree with their config, or are damaged, from headers alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from thrifty.costs.shape import read_shape
from thrifty.signals.weight_files import check_weights, stored_tensors


@pytest.fixture
def model(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def rewrite(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder):
    with pytest.raises(ValueError, match="\nhint: ") as error:
        check_weights(folder, read_shape(folder))
    return str(error.value)


def test_weights_of_their_config_pass(model):
    assert check_weights(model, read_shape(model))
    names = {tensor.name for tensor in stored_tensors(model)}
    assert names == set(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    assert not check_weights(model, read_shape(model))


def test_another_vocabulary_or_width(model):
    rewrite(model, vocab_size=read_shape(model).vocab_size + 8)
    assert "are of different models" in refusal(model)


def test_a_head_that_the_config_unties_but_nobody_stored(model):
    weights = load_file(model / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, model / "model.safetensors")
    rewrite(model, tie_word_embeddings=True)
    assert check_weights(model, read_shape(model))
    rewrite(model, tie_word_embeddings=False)
    assert "holds no head" in refusal(model)


def test_a_head_that_the_config_ties_but_is_another_matrix(model):
    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    save_file(weights, model / "model.safetensors")
    rewrite(model, tie_word_embeddings=True)
    assert check_weights(model, read_shape(model))
    weights["lm_head.weight"] = torch.randn_like(embedding)
    save_file(weights, model / "model.safetensors")
    assert "would be ignored" in refusal(model)


def test_a_file_that_was_cut(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "bytes are announced" in refusal(model)
    file.write_bytes(whole[:20])
    assert "its header is cut" in refusal(model)
    file.write_bytes(b"\x10" + b"\0" * 7 + b"{]" + b" " * 30)
    assert "cannot be read" in refusal(model)


def test_another_number_of_layers(model):
    rewrite(model, num_hidden_layers=4)
    assert "weights of 2 layers, but the config says 4" in refusal(model)
    rewrite(model, num_hidden_layers=1)
    assert "weights of 2 layers, but the config says 1" in refusal(model)


def test_layers_of_files_that_are_not_there_yet(model):
    rewrite(model, num_hidden_layers=4)
    files = {"a.weight": "model.safetensors", "b.weight": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert check_weights(model, read_shape(model))


def test_another_mlp_or_attention(model):
    inner = read_shape(model).intermediate_size
    rewrite(model, intermediate_size=2 * inner)
    assert f"gate_proj.weight in {model}" in refusal(model)
    assert f"the config says {2 * inner} x 32" in refusal(model)
    rewrite(model, intermediate_size=inner, num_key_value_heads=1)
    assert "k_proj.weight" in refusal(model)


def test_packed_weights_are_not_measured(model):
    """Four bits to a byte: the shape says nothing of the matrix."""
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(weights, model / "model.safetensors")
    assert check_weights(model, read_shape(model))
