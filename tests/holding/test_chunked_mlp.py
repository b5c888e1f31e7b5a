"""The MLP in slices: the same gradients, what is kept and computed, and what holds it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.costs.published import TINY
from tests.costs.tracing import allocated_peak, input_bytes
from tests.holding.held_models import ADAPTERS, gradients, held, kept_bytes, model_of, rows
from torch.utils.flop_counter import FlopCounterMode

from thrifty.core.resolve import resolve
from thrifty.costs.flops import step_flops
from thrifty.costs.hardware import load_device
from thrifty.costs.memory import account, saved_bytes
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds

WIDE = {
    "llama": TINY["llama"] | {"hidden_size": 64, "intermediate_size": 352, "num_hidden_layers": 3},
    "gemma2": TINY["gemma2"] | {"intermediate_size": 256},
    # Its own code drops out inside of the MLP, which is priced as if it were outside.
    "gpt2": TINY["gpt2"] | {"n_embd": 64, "n_layer": 3, "resid_pdrop": 0.0},
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "falcon")
HELD = ("weights", "adapter", "optimizer_states")


def sliced(model, tokens: int):
    return held(model, "activations", {"chunked_mlp": {"tokens": tokens}})


@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.long
def test_gradients_are_the_same(family, way):
    """But for the order in which the slices' are summed."""
    dropless = {"resid_pdrop": 0.0} if family == "gpt2" else {}
    model = model_of(TINY[family] | dropless, ADAPTERS[way])
    inputs = rows(model)
    loss, wanted = gradients(copy.deepcopy(model), inputs)
    for tokens in (5, 8, 24, 1024):
        same_loss, found = gradients(sliced(model, tokens), inputs)
        torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=0)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            size = float(gradient.abs().max()) or 1.0
            assert float((found[name] - gradient).abs().max()) < 2e-6 * size, name


def test_slices_run_in_training_alone():
    model = model_of(TINY["llama"])
    inputs, seen = rows(model), []
    found = sliced(model, 8)
    found.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    found(**inputs)
    assert [tuple(shape)[1] for shape in seen] == [8, 8, 8]
    seen.clear()
    found.eval()(**inputs)
    with torch.no_grad():
        found.train()(**inputs)
    assert [tuple(shape)[1] for shape in seen] == [24, 24]


def setting_of(way: str, **fields) -> MemorySetting:
    plain = MemorySetting(dtype="float32", adapter=ADAPTERS[way], **fields)
    return resolve("activations", {"chunked_mlp": {"tokens": 32}}).rewrite(plain)


@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("family", WIDE)
def test_flops_are_what_is_priced(family, way):
    config = WIDE[family]
    model = sliced(model_of(config, ADAPTERS[way], attention="eager"), 32)
    inputs = rows(model, 2, 96)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    shape = ModelShape.from_config(config)
    priced = setting_of(way, micro_batch=2, sequence=96)
    assert step_flops(shape, priced) == counter.get_total_flops()
    assert step_flops(shape, replace(priced, mlp_chunk=0)) < counter.get_total_flops()


@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("family", WIDE)
def test_what_is_kept_is_what_is_priced(family, way):
    config = WIDE[family]
    model = sliced(model_of(config, ADAPTERS[way]), 32)
    inputs, shape = rows(model, 4, 96), ModelShape.from_config(config)
    measured = kept_bytes(lambda: model(**inputs).loss)
    priced = setting_of(way, micro_batch=4, sequence=96)
    declared = saved_bytes(shape, priced, (4,), head=True)[0]
    assert declared == pytest.approx(measured, rel=0.05)
    whole = saved_bytes(shape, replace(priced, mlp_chunk=0), (4,), head=True)[0]
    assert declared < 0.8 * whole


@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("family", WIDE)
def test_the_peak_is_what_is_priced(family, way):
    config = WIDE[family]
    model = sliced(model_of(config, ADAPTERS[way]), 32)
    inputs, shape = rows(model, 8, 96), ModelShape.from_config(config)
    model(**inputs).loss.backward()
    model.zero_grad()
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    phases = account(shape, setting_of(way, micro_batch=8, sequence=96)).phases
    beside = max(
        sum(size for term, size in phases[phase].items() if term not in HELD)
        for phase in ("loss", "backward")
    )
    assert beside - input_bytes(inputs, with_masks=False) == pytest.approx(measured, rel=0.05)


def test_seconds_are_those_of_the_mlp_once_more():
    shape, device = ModelShape.from_config(WIDE["llama"]), load_device("h100")
    plain = MemorySetting(micro_batch=64, sequence=1024, device_kind="cuda")
    keep, again, all_again = (
        step_seconds(shape, each, device)
        for each in (plain, replace(plain, mlp_chunk=256), replace(plain, recompute=1))
    )
    assert keep < again < all_again


def test_bad_input():
    technique = resolve("activations", "chunked_mlp")
    assert "nothing is kept" in technique.refuses(MemorySetting(zeroth_order=True))
    dora = MemorySetting(adapter=Adapter(form="dora"))
    assert "anew for each slice" in technique.refuses(dora)
    for family, says in (("mixtral", "has experts"), ("opt", "is no module of its own")):
        with pytest.raises(ValueError, match=rf"{says}.*\nhint: recompute"):
            technique.hold(model_of(TINY[family]))
