"""Parts of a model that take turns: what a step takes on average, and at its worst turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from published import PUBLISHED, TINY
from torch.utils.flop_counter import FlopCounterMode
from tracing import batch, build

from thrifty.costs.blocks import Blocks, mean_turns
from thrifty.costs.flops import step_flops
from thrifty.costs.hardware import load_device
from thrifty.costs.held import checkpoint_bytes, num_trained, state_bytes
from thrifty.costs.job import job_account, job_peaks
from thrifty.costs.memory import MemorySetting, account, peaks
from thrifty.costs.setting import at_turn
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import seconds_by_optimizer, step_seconds
from thrifty.fake_step import record
from thrifty.holding.blockwise import turn_to, weights_of

ROWS, SEQUENCE = 2, 16
DEEP = {
    name: config | {"n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers": 5}
    for name, config in TINY.items()
}
UNTIED = DEEP["llama"] | {"tie_word_embeddings": False}
MODELS = {"untied": UNTIED, "tied": DEEP["llama"] | {"tie_word_embeddings": True}}
MODELS |= {name: DEEP[name] for name in ("gpt2", "qwen3_moe")}
DIVIDED = {
    "badam": Blocks(layers=2),
    "lisa": Blocks(layers=2, ends="trained", drawn=True),
    "hift": Blocks(layers=2, ends="turns", parked=True),
}


def cycle_of(shape, blocks):
    return blocks.cycle(shape.num_layers, shape.tie_word_embeddings)


@pytest.mark.parametrize("recompute", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("blocks", DIVIDED.values(), ids=DIVIDED)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.long
def test_flops_are_the_mean_of_a_cycle(config, blocks, recompute):
    shape = ModelShape.from_config(config)
    model = build(config, attention="eager", recompute=bool(recompute))
    optimizer = torch.optim.SGD(model.parameters())
    measured = []
    for block in cycle_of(shape, blocks):
        turn_to(model, optimizer, block)
        with FlopCounterMode(display=False) as counter:
            model(**batch(ROWS, SEQUENCE)).loss.backward()
        measured.append(counter.get_total_flops())
    setting = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE, blocks=blocks, recompute=recompute)
    assert step_flops(shape, setting) == pytest.approx(np.mean(measured), rel=1e-12)


@pytest.mark.parametrize("blocks", DIVIDED.values(), ids=DIVIDED)
@pytest.mark.parametrize("name", ["Llama-3-8B", "Gemma-3-1B", "Qwen3-30B-A3B"])
def test_few_turns_tell_of_all(name, blocks):
    """Seconds and FLOPs of every turn of a cycle, one by one, and its highest peak."""
    shape, device = ModelShape.from_config(PUBLISHED[name]), load_device("h100")
    for recompute in (0, 1):
        setting = MemorySetting(blocks=blocks, device_kind="cuda", recompute=recompute)
        turns = [at_turn(setting, block) for block in cycle_of(shape, blocks)]
        seconds = np.mean([step_seconds(shape, turn, device) for turn in turns])
        assert step_seconds(shape, setting, device) == pytest.approx(seconds, rel=1e-3)
        flops = np.mean([step_flops(shape, turn) for turn in turns])
        assert step_flops(shape, setting) == pytest.approx(flops, rel=1e-12)
        highest = max(account(shape, turn).peak_memory_bytes for turn in turns)
        assert account(shape, setting).peak_memory_bytes == pytest.approx(highest, rel=1e-12)
        assert state_bytes(shape, setting) == max(state_bytes(shape, turn) for turn in turns)
        assert len(mean_turns(shape, blocks)) <= 8


@pytest.mark.parametrize("blocks", DIVIDED.values(), ids=DIVIDED)
def test_what_is_trained_at_a_turn(blocks):
    for config in MODELS.values():
        shape, model = ModelShape.from_config(config), build(config)
        for block in cycle_of(shape, blocks):
            elements = sum(weight.numel() for weight in weights_of(model, block))
            setting = at_turn(MemorySetting(blocks=blocks), block)
            assert num_trained(shape, setting) == elements


TRACED = {
    "badam": {},
    "badam of small batches": {"micro_batch": 1, "sequence": 16},
    "badam, every layer again": {"recompute": 1},
    "badam in bfloat16": {"dtype": "bfloat16"},
    "lisa": {"blocks": DIVIDED["lisa"]},
    "lisa, accumulating": {"blocks": DIVIDED["lisa"], "gradient_accumulation_steps": 2},
    "hift": {"blocks": DIVIDED["hift"]},
    "hift, every layer again": {"blocks": DIVIDED["hift"], "recompute": 1},
}


USUAL = ("badam", "badam, every layer again", "lisa", "hift")


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=() if name in USUAL else pytest.mark.slow)
        for name, fields in TRACED.items()
    ],
)
@pytest.mark.long
def test_the_peak_is_that_of_the_worst_turn(fields, tied):
    """Of the real step of each turn, on fake tensors. Their device has no host beside it, on which
    states could wait."""
    config = MODELS["untied"] | {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 500}
    config |= {"tie_word_embeddings": tied}
    shape = ModelShape.from_config(config)
    common = {"micro_batch": 4, "sequence": 96, "dtype": "float32", "blocks": DIVIDED["badam"]}
    setting = MemorySetting(**common | {"device_kind": "cuda"} | fields)
    traced = [
        max(record(config, at_turn(setting, block)).peaks().values())
        for block in cycle_of(shape, setting.blocks)
    ]
    assert account(shape, setting).peak_memory_bytes == pytest.approx(max(traced), rel=0.03)
    assert max(record(config, setting).peaks().values()) == max(traced)


@pytest.mark.parametrize("blocks", DIVIDED.values(), ids=DIVIDED)
@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_a_search_prices_what_a_plan_does(blocks, device_kind):
    shape, batches = ModelShape.from_config(PUBLISHED["Llama-3-8B"]), (1, 4)
    run = MemorySetting(blocks=blocks, sequence=2048, device_kind=device_kind)
    runs = [run, replace(run, states=replace(run.states, relative=1.0))]
    for row, one in zip(peaks(shape, runs, batches)[0], runs, strict=True):
        alone = [account(shape, replace(one, micro_batch=b)).peak_memory_bytes for b in batches]
        assert row == pytest.approx(alone, rel=1e-12)
    for row, one in zip(job_peaks(shape, runs, batches)[0], runs, strict=True):
        alone = [job_account(shape, replace(one, micro_batch=b)).peak_memory_bytes for b in batches]
        assert row == pytest.approx(alone, rel=1e-12)
    device = load_device("h100")
    for row, one in zip(seconds_by_optimizer(shape, runs, device, batches), runs, strict=True):
        alone = [step_seconds(shape, replace(one, micro_batch=b), device) for b in batches]
        assert row == pytest.approx(alone, rel=1e-12)


def test_all_layers_and_both_ends_are_all_weights():
    for config in MODELS.values():
        shape = ModelShape.from_config(config)
        everything = Blocks(layers=shape.num_layers, ends="trained")
        plain = MemorySetting(micro_batch=4, sequence=64, dtype="float32")
        run = replace(plain, blocks=everything)
        assert account(shape, run).phases == account(shape, plain).phases
        assert step_flops(shape, run) == step_flops(shape, plain)
        assert checkpoint_bytes(shape, run) == checkpoint_bytes(shape, plain)
        device = load_device("h100")
        assert step_seconds(shape, run, device) == step_seconds(shape, plain, device)


def test_an_8b_model_on_24_gib():
    """arXiv:2404.02827 trains Llama-3-8B within 23.5 GB: 16 of weights, a block of 218 million
    with its states, which the authors keep in float32 and here are in bfloat16."""
    shape = ModelShape.from_config(PUBLISHED["Llama-3-8B"])
    run = MemorySetting(blocks=Blocks(layers=1), sequence=1024, device_kind="cuda", recompute=1)
    seen = account(shape, run)
    assert seen.phases["optimizer"]["optimizer_states"] == 4 * shape.layer_parameters(0)
    assert 16e9 < seen.peak_memory_bytes < 23.5e9


def test_where_states_wait():
    shape = ModelShape.from_config(PUBLISHED["Llama-3-8B"])
    dropped, parked = (Blocks(layers=1, ends="turns", parked=p) for p in (False, True))
    on = {
        (blocks, kind): MemorySetting(blocks=blocks, device_kind=kind)
        for blocks in (dropped, parked)
        for kind in ("cpu", "cuda")
    }
    head = shape.head_parameters + shape.hidden_size  # with its norm
    all_states, one = 4 * shape.num_parameters, 4 * head
    assert state_bytes(shape, on[parked, "cuda"]) == one
    assert state_bytes(shape, on[dropped, "cpu"]) == one
    assert state_bytes(shape, on[parked, "cpu"]) == all_states  # the host is the device
    weights = 2 * shape.num_parameters
    assert checkpoint_bytes(shape, on[dropped, "cuda"]) == weights + one
    assert checkpoint_bytes(shape, on[parked, "cuda"]) == weights + all_states
    device = load_device("h100")
    slower = [step_seconds(shape, on[blocks, "cuda"], device) for blocks in (dropped, parked)]
    moved = 2 * all_states / 34 / device.host_bytes_per_second  # 32 layers and two ends
    assert slower[1] - slower[0] == pytest.approx(moved)
