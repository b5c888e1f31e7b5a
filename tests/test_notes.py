"""What a plan says of a config before its numbers: once, where the plan is made."""

from __future__ import annotations

import json

import pytest

from thrifty.core.budget import Budget
from thrifty.preparation import Asked, plan_run, quick_plan

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "num_hidden_layers": 4,
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def said(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    budget = Budget(flops=1e15, memory_bytes=8 * 2**30)
    quick_plan(Asked(model=str(folder), budget=budget, device="h100"), lines.append)
    return lines


def test_a_complete_config_is_planned_without_a_word(model):
    assert said(model, CONFIG) == []


def test_what_a_config_leaves_open_is_said_once(model):
    del (config := dict(CONFIG))["num_hidden_layers"]
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    first, second = said(model, config)
    assert "lacks num_hidden_layers" in first
    assert "num_hidden_layers 32" in first
    assert "stored quantised (bitsandbytes)" in second


def test_a_run_says_it_too(model, tmp_path):
    (model / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["OPTForCausalLM"]}))
    lines = []
    asked = Asked(model=str(model), pool=(str(tmp_path / "none.jsonl"),), budget=Budget(flops=1e15))
    with pytest.raises((ValueError, OSError)):  # no tokenizer, no pool: the config comes first
        plan_run(asked, tmp_path / "run", lines.append)
    assert sum("names OPTForCausalLM but model_type llama" in line for line in lines) == 1
