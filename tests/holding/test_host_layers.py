"""Layers on the host: the same numbers, one at a time there, and the bytes that come and stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.costs.published import TINY
from tests.holding.held_models import gradients, model_of, rows

from thrifty.core.resolve import resolve
from thrifty.costs.hardware import load_device
from thrifty.costs.held import fetched_bytes, weight_bytes
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.holding.host_layers import Link, wait_on_host
from thrifty.signals.models import layers_of, load_model

CUDA = MemorySetting(device_kind="cuda", micro_batch=2, sequence=24)


class CountingLink(Link):
    """Counts the bytes that came."""

    def __init__(self) -> None:
        self.bytes = 0

    def fetch(self, there, here):
        self.bytes += there.nbytes
        super().fetch(there, here)


def layers(num: int) -> dict[str, Any]:
    return TINY["llama"] | {"num_hidden_layers": num}


def prepared(model: Any, config: dict[str, Any], trained: str = "lora") -> Any:
    options = {} if trained == "ia3" else {"rank": 4}
    technique = resolve("trained", {trained: options} if options else trained)
    found = technique.prepare(model, ModelShape.from_config(config), 1).train()
    for name, weight in found.named_parameters():
        if "lora_B" in name or "bottleneck.up" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return found


def both(config: dict[str, Any], trained: str = "lora", link: Link | None = None) -> list[Any]:
    """The same model with its layers on the host, and with all in place."""
    plain = model_of(config)
    away = copy.deepcopy(plain)
    wait_on_host(away, "cpu", link)
    found = []
    for model in (away, plain):
        torch.manual_seed(5)
        found.append(prepared(model, config, trained))
    return found


def here(model: Any) -> int:
    """Bytes on the device, of the layers' frozen weights."""
    frozen = [w for w in layers_of(model).parameters() if not w.requires_grad]
    return sum(weight.untyped_storage().nbytes() for weight in frozen)


@pytest.mark.parametrize("activations", ["keep", "recompute", "recompute_half", "selective"])
@pytest.mark.parametrize("trained", ["lora", "lora_fa", "ia3", "adapters"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradients_are_the_same_bit_for_bit(family, trained, activations):
    away, plain = both(TINY[family], trained)
    for model in (away, plain):
        resolve("activations", activations).hold(model)
    inputs = rows(plain)
    for _ in range(2):  # the second begins with a layer that is there
        (loss, found), (wanted_loss, wanted) = (gradients(each, inputs) for each in (away, plain))
        assert torch.equal(loss, wanted_loss)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for model in (away, plain):
            model.zero_grad()


@pytest.mark.parametrize("family", ["mixtral", "opt", "deepseek_v3"])
def test_so_are_those_of_other_families(family):
    away, plain = both(TINY[family])
    inputs = rows(plain)
    (loss, found), (wanted_loss, wanted) = (gradients(each, inputs) for each in (away, plain))
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_layer_is_there_at_a_time():
    config = layers(4)
    away, _ = both(config)
    seen = []
    for layer in layers_of(away):
        layer.register_forward_hook(lambda *_: seen.append(here(away)))
    loss = away(**rows(away)).loss
    for weight in away.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda _: seen.append(here(away)))
    loss.backward()
    shape = ModelShape.from_config(config)
    assert len(seen) > 8
    assert set(seen) == {4 * shape.layer_parameters(0)}


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("recompute", [0, 1])
def test_the_bytes_that_come_are_those_priced(num, recompute):
    config, link = layers(num), CountingLink()
    away, _ = both(config, link=link)
    if recompute:
        resolve("activations", "recompute").hold(away)
    inputs, shape = rows(away), ModelShape.from_config(config)
    away(**inputs).loss.backward()
    first = 4 * shape.layer_parameters(0)
    setting = replace(CUDA, dtype="float32", layers_on_host=True)
    assert link.bytes == fetched_bytes(shape, setting) + first
    link.bytes = 0
    away(**inputs).loss.backward()
    assert link.bytes == fetched_bytes(shape, setting)


def test_what_is_there_and_what_it_takes_are_priced():
    shape = ModelShape.from_config(layers(5))
    adapted = resolve("trained", "lora").rewrite(CUDA)
    plain = resolve("weights", "bfloat16").rewrite(adapted)
    away = resolve("weights", "layer_offload").rewrite(adapted)
    layer = 2 * shape.layer_parameters(0)
    assert weight_bytes(shape, plain) - weight_bytes(shape, away) == 4 * layer
    model = model_of(layers(5)).bfloat16()
    wait_on_host(model, "cpu")
    model(**rows(model))
    measured = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    assert measured == weight_bytes(shape, away)
    device = load_device("h100")
    seconds = [step_seconds(shape, each, device) for each in (plain, away)]
    assert seconds[1] - seconds[0] == pytest.approx(8 * layer / device.host_bytes_per_second)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("base")
    model_of(layers(3)).save_pretrained(made)
    return made


def test_it_trains_from_a_folder_and_stock_libraries_load_what_it_saves(folder, tmp_path):
    technique, config = resolve("weights", "layer_offload"), layers(3)
    model = prepared(technique.load(folder, "cpu"), config)
    model.to("cpu")  # as the Trainer does
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    assert all(".lora_" in name for name, _ in named)
    group = {"params": named, "lr": 1e-2, "weight_decay": 0.0}
    optimizer = resolve("states", "adamw").optimizer([group], ModelShape.from_config(config))
    inputs, losses = rows(model), []
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        loaded = PeftModel.from_pretrained(load_model(folder, "bfloat16", "cpu"), tmp_path).eval()
        assert torch.equal(loaded(ids).logits, wanted)
        assert torch.equal(model(ids).logits, wanted)


def test_activations_that_wait_on_the_host_take_no_weights_with_them():
    away, plain = both(layers(3))
    for model in (away, plain):
        resolve("activations", "offload").hold(model)
    inputs = rows(plain)
    (_, found), (_, wanted) = (gradients(each, inputs) for each in (away, plain))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_it_refuses():
    technique = resolve("weights", "layer_offload")
    made = {
        name: resolve("trained", name).rewrite(CUDA)
        for name in ("lora", "adalora", "dora", "pissa", "loftq", "mezo")
    }
    assert technique.refuses(made["lora"]) is None
    assert technique.refuses(made["adalora"]) is None
    assert "no other place" in technique.refuses(replace(made["lora"], device_kind="cpu"))
    for name in ("dora", "pissa"):
        assert "to begin with" in technique.refuses(made[name])
    assert "lose nothing" in technique.refuses(made["loftq"])
    for setting in (CUDA, made["mezo"]):
        assert "cannot be trained themselves" in technique.refuses(setting)
    assert "shared among devices" in technique.refuses(replace(made["lora"], num_devices=2))
