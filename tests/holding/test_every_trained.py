"""Every technique of what is trained and of how weights lie, on a small model: what it trains, the
bytes of it, that it learns, and that stock libraries load what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.costs.tracing import build
from tests.holding.trained_llama import CONFIG, SHAPE
from transformers import AutoModelForCausalLM

from thrifty.core.resolve import all_names, method_class, resolve
from thrifty.costs.held import weight_bytes
from thrifty.costs.setting import MemorySetting
from thrifty.costs.trained import trained
from thrifty.signals.adapters import adapter_weights
from thrifty.signals.models import layers_of, load_model

IDS = torch.arange(96).view(4, 24) % 7
OPTIONS: dict[str, dict[str, Any]] = {"badam": {"switch_steps": 1}, "lisa": {"layers": 1}}
"""So that their turns fit in a few steps of a model of two layers."""
BESIDE = {"loftq": "nf4"}
"""Weights that a technique needs; else float32."""


def running(kind: str) -> list[str]:
    return [name for name in all_names(kind) if method_class(kind, name).runs]


TRAINED, WEIGHTS = running("trained"), running("weights")


def technique(kind: str, name: str) -> Any:
    options = OPTIONS.get(name, {})
    if hasattr(method_class(kind, name), "rank"):
        options = {"rank": 8} | options
    return resolve(kind, {name: options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base")
    build(CONFIG).save_pretrained(made)
    return made


def held(folder: Path, trains: str, weights: str) -> tuple[Any, Any, MemorySetting]:
    """The technique, the model as it is trained, and the setting that it makes."""
    chosen, storage = technique("trained", trains), technique("weights", weights)
    start = MemorySetting(device_kind="cuda")  # on which all of them have a place
    setting = storage.rewrite(chosen.rewrite(start))
    model = chosen.prepare(storage.load(folder, "cpu"), SHAPE, 1).train()
    return chosen, model, resolve("states", "adamw").rewrite(setting)


def beside(trains: str) -> str:
    return BESIDE.get(trains, "float32")


def train(chosen: Any, model: Any, steps: int = 3) -> list[float]:
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    rate = 0.1 if chosen.short else 1e-3 * chosen.learning_rate  # beside lomo's
    groups = [{"params": named, "lr": rate, "weight_decay": 0.0}]
    optimizer = chosen.optimizer(groups, SHAPE, 1)
    if optimizer is None:
        optimizer = resolve("states", "adamw").optimizer(groups, SHAPE)
    losses = []
    for step in range(steps):
        chosen.at_step(model, optimizer, step, 1)
        if hasattr(optimizer, "estimate"):
            loss = optimizer.estimate(lambda: model(input_ids=IDS, labels=IDS).loss.detach())
        if not hasattr(optimizer, "estimate") or chosen.short:
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def test_techniques_are_tested():
    """The tests would pass without any."""
    assert {"full", "lora", "adalora", "hift", "mezo", "dora"} <= set(TRAINED)
    assert {"float32", "nf4", "fp8", "layer_offload"} <= set(WEIGHTS)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_is_what_is_declared(folder, name):
    """At every step of a turn; of what is held beside the weights, the bytes too."""
    chosen, model, setting = held(folder, name, beside(name))
    if setting.zeroth_order:
        return  # all weights, without a gradient
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for step in range(4):
        chosen.at_step(model, optimizer, step, 1)
        found = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        now = chosen.setting_at(setting, SHAPE, step, 1)
        assert found == trained(SHAPE, now).num_elements, step
    adapter = sum(weight.nbytes for weight in adapter_weights(model))
    declared = 0.0
    if setting.adapter is not None:
        declared = setting.adapter.num_parameters(SHAPE) * setting.trained_itemsize
    assert adapter == pytest.approx(declared, rel=0.05)


@pytest.mark.parametrize("name", TRAINED)
def test_nothing_else_moves_and_the_loss_does(folder, name):
    chosen, model, setting = held(folder, name, beside(name))
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    may = {key for key, weight in model.named_parameters() if weight.requires_grad}
    losses = train(chosen, model)
    assert all(map(torch.isfinite, torch.tensor(losses)))
    if setting.zeroth_order:
        assert losses[-1] != losses[0]
    else:
        assert losses[-1] < losses[0]
    moved = {key for key, w in model.named_parameters() if not torch.equal(w, before[key])}
    assert moved
    assert moved <= may


@pytest.mark.parametrize("name", TRAINED)
def test_stock_libraries_load_what_it_saves(folder, tmp_path, name):
    chosen, model, _ = held(folder, name, beside(name))
    train(chosen, model)
    wanted = logits(model)
    saved, made = tmp_path / "saved", tmp_path / "made"
    made.mkdir()
    if not chosen.save(model, saved):
        model.save_pretrained(saved)
    left = made if chosen.publish(saved, made, folder) else saved
    if (left / "adapter_config.json").exists():
        base = technique("weights", beside(name)).load(folder, "cpu")
        again = PeftModel.from_pretrained(base, str(left))
    else:
        again = AutoModelForCausalLM.from_pretrained(left, dtype=torch.float32)
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(
        wanted.float(), logits(load_model(folder, "float32", "cpu")), atol=1e-6
    )


def weight_size(model: Any) -> int:
    """Of what lies on the device, scales included, each storage once."""
    stored: dict[int, int] = {}
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        tensors = [weight, getattr(weight, "SCB", None)]
        if state is not None:
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                stored[storage.data_ptr() or -len(stored) - 1] = storage.nbytes()
    scales = (getattr(module, "scales", None) for module in model.modules())
    return sum(stored.values()) + sum(each.nbytes for each in scales if each is not None)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_take_the_bytes_that_are_declared(folder, name):
    storage = technique("weights", name)
    setting = storage.rewrite(resolve("trained", "lora").rewrite(MemorySetting()))
    model = storage.load(folder, "cpu")
    with torch.no_grad():
        model(IDS)  # after which a layer is there, where they come and go
    assert weight_size(model) == pytest.approx(weight_bytes(SHAPE, setting), rel=0.05)


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_adapter_learns_on_them_and_is_loaded_on_stock_weights(folder, tmp_path, name):
    chosen, model, _ = held(folder, "lora", name)
    frozen = {
        key: weight.detach().clone()
        for key, weight in model.named_parameters()
        if not weight.requires_grad and weight.untyped_storage().nbytes()
    }
    losses = train(chosen, model)
    assert losses[-1] < losses[0]
    for key, weight in model.named_parameters():
        if key in frozen and weight.untyped_storage().nbytes():
            assert torch.equal(weight, frozen[key]), key
    wanted = logits(model).float()
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(base, str(tmp_path)))
    # Off by what few bits lose of the weights, and less than what was learnt.
    plain = logits(load_model(folder, "float32", "cpu"))
    assert float((found - wanted).norm()) < float((found - plain).norm())
    assert len(list(layers_of(model))) == SHAPE.num_layers
