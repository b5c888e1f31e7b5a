"""What is kept from the forward to the backward: the same gradients, the bytes and FLOPs priced."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.costs.published import TINY
from tests.holding.held_models import (
    ADAPTERS,
    FAMILIES,
    ROWS,
    SEQUENCE,
    USUAL,
    gradients,
    held,
    kept_bytes,
    model_of,
    rows,
)
from torch.utils.flop_counter import FlopCounterMode

from thrifty.core.resolve import all_names, method_class, resolve
from thrifty.costs import memory
from thrifty.costs.flops import step_flops
from thrifty.costs.operations import Adapter
from thrifty.costs.phases import Step
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.holding.host_activations import Link, offload

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SLICED = "chunked_mlp"
"""Its sums are of slices, and not every family has it: test_chunked_mlp.py."""
NAMES = [
    name
    for name in all_names("activations")
    if method_class("activations", name).runs and name != SLICED
]
EVERY_THIRD = {"recompute": {"every": 3}}
TECHNIQUES = [*NAMES, EVERY_THIRD]
CASES = [
    pytest.param(family, way, marks=() if family in USUAL else pytest.mark.slow)
    for family in FAMILIES
    for way in ADAPTERS
]
WIDE = TINY["llama"] | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5}
WIDE_GPT2 = TINY["gpt2"] | {"n_embd": 128, "n_layer": 5}
ON_THE_HOST = ("offload", "recompute_offload")
"""Where host and device are one they are no use, and the planner refuses them."""


class CountingLink(Link):
    """Counts the bytes that went down."""

    def __init__(self) -> None:
        self.bytes = 0

    def down(self, tensor):
        self.bytes += tensor.nbytes
        return super().down(tensor)


@pytest.mark.parametrize(("family", "way"), CASES)
def test_gradients_are_the_same_bit_for_bit(family, way):
    model = model_of(TINY[family], ADAPTERS[way])
    inputs = rows(model)
    loss, wanted = gradients(copy.deepcopy(model), inputs)
    for name in TECHNIQUES:
        if (name, family) == ("selective", "gpt_oss"):
            continue  # refused, see below
        same_loss, found = gradients(held(model, "activations", name), inputs)
        assert torch.equal(loss, same_loss), name
        assert found.keys() == wanted.keys(), name
        assert all(torch.equal(found[each], wanted[each]) for each in wanted), name


def test_it_is_what_the_trainer_does():
    """Of ``TrainingArguments(activation_checkpointing=True)``: the same flags."""
    model = model_of(TINY["llama"], Adapter(rank=4))
    inputs = rows(model)
    theirs = copy.deepcopy(model)
    theirs.activation_checkpointing_enable(None)
    ours = held(model, "activations", "recompute")
    flags = [
        [getattr(module, "gradient_checkpointing", None) for module in each.modules()]
        for each in (theirs, ours)
    ]
    assert flags[0] == flags[1]
    assert True in flags[0]
    (_, one), (_, other) = gradients(theirs, inputs), gradients(ours, inputs)
    assert all(torch.equal(one[each], other[each]) for each in one)


@pytest.mark.parametrize("config", [WIDE, WIDE_GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name not in ON_THE_HOST], ids=str)
def test_what_is_kept_is_what_is_priced(name, way, config):
    shape, model = ModelShape.from_config(config), model_of(config, ADAPTERS[way])
    model, inputs = held(model, "activations", name), rows(model, 4, 96)
    measured = kept_bytes(lambda: model(**inputs).loss)
    setting = MemorySetting(micro_batch=4, sequence=96, dtype="float32", adapter=ADAPTERS[way])
    setting = resolve("activations", name).rewrite(setting)
    declared = memory.saved_bytes(shape, setting, (4,), head=True)[0]
    assert declared == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("config", "way"),
    [(WIDE, "full"), (WIDE, "lora"), (WIDE_GPT2, "full")],
    ids=["llama", "llama adapted", "gpt2"],
)
@pytest.mark.parametrize("name", ON_THE_HOST)
def test_what_goes_to_the_host_is_what_is_priced(name, way, config):
    shape, model = ModelShape.from_config(config), model_of(config, ADAPTERS[way])
    technique = resolve("activations", name)
    setting = technique.rewrite(
        MemorySetting(micro_batch=4, sequence=96, dtype="float32", adapter=ADAPTERS[way])
    )
    if setting.recompute:
        resolve("activations", "recompute").hold(model)
    link = CountingLink()
    offload(model, link)
    loss = model(**rows(model, 4, 96)).loss
    step = Step(shape, replace(setting, offload=False), (4,))
    # A norm is the decoder's, though it is priced with the head. What layers that run again are
    # given beside their input (masks, rotary tables) stays where it is.
    declared = step.stored.layers.sum() + step.passes.normed[0]
    first = step.passes.bytes(step.passes.first.saved)[0]
    declared += first if setting.recompute else step.passes.before[0]
    assert declared == pytest.approx(link.bytes, rel=0.05)
    loss.backward()


def test_what_is_written_to_in_between_is_another():
    """Of one storage both versions wait."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Identity()])
            self.weight = torch.nn.Parameter(torch.tensor([2.0]))

        def forward(self, x):
            kept = torch.zeros(3)
            first = self.weight * kept.add_(x)
            return first + (self.weight**2) * kept.add_(1.0)

    model = torch.nn.Sequential(Decoder())
    offload(model)
    model[0].forward(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert model[0].weight.grad == pytest.approx(6 + 2 * 2 * 9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("name", TECHNIQUES, ids=str)
def test_flops_are_what_is_priced(name, way, family):
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = TINY[family] | {layers: 4 if name is EVERY_THIRD else 3}
    shape = ModelShape.from_config(config)
    # On a CPU fused attention counts as nothing.
    model = held(model_of(config, ADAPTERS[way], attention="eager"), "activations", name)
    inputs = rows(model)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    setting = MemorySetting(
        micro_batch=ROWS, sequence=SEQUENCE, adapter=ADAPTERS[way], dtype="float32"
    )
    setting = resolve("activations", name).rewrite(setting)
    assert step_flops(shape, setting) == counter.get_total_flops()


def test_a_copy_of_a_held_model_has_weights_of_its_own():
    model = held(model_of(TINY["llama"]), "activations", "recompute_offload")
    copied, inputs = copy.deepcopy(model), rows(model)
    before = model(**inputs).loss
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(copied(**inputs).loss, before)
    assert not torch.equal(model(**inputs).loss, before)


def test_bad_combinations_are_refused():
    for name in ON_THE_HOST:
        technique = resolve("activations", name)
        assert "no other place" in technique.refuses(MemorySetting(device_kind="cpu"))
        assert technique.refuses(MemorySetting(device_kind="cuda")) is None
    for name in NAMES:
        reason = resolve("activations", name).refuses(MemorySetting(zeroth_order=True))
        assert (reason is None) == (name == "keep")
    with pytest.raises(ValueError, match=r"add a bias to a product in place.*\nhint: recompute"):
        held(model_of(TINY["gpt_oss"]), "activations", "selective")
    model = model_of(TINY["llama"])
    shape = ModelShape.from_config(TINY["llama"])
    assert resolve("activations", "recompute").refuses_model(shape, "cpu") is None
    reason = resolve("activations", {"recompute": {"every": 40}}).refuses_model(shape, "cpu")
    assert reason == f"there is no 40-th of {shape.num_layers} layers"
    with pytest.raises(ValueError, match="every"):
        resolve("activations", {"recompute": {"every": 0}})
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"cannot run again in the backward\nhint: keep"):
        held(model, "activations", "recompute_half")
