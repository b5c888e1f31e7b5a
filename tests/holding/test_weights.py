"""Weights in memory: the bits declared, the error that a format allows, adapters on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.costs.published import TINY
from tests.costs.tracing import allocated_peak, batch, build, input_bytes, saved_bytes

from thrifty.core.resolve import resolve
from thrifty.costs.memory import MemorySetting, account
from thrifty.costs.memory import saved_bytes as priced_saved_bytes
from thrifty.costs.shape import ModelShape
from thrifty.signals.models import layers_of

CONFIG = TINY["llama"] | {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
SHAPE = ModelShape.from_config(CONFIG)
FEW_BITS = {"nf4": {"double": True}, "nf4 plain": {"double": False}, "int8": {}, "fp8": {}}
IDS = torch.arange(24).view(2, 12) % 160
LOGITS_OFF = {"nf4": 0.3, "int8": 0.03, "fp8": 0.1}
"""Of a model of random weights, relative; bfloat16's own are about 0.01."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base")
    build(CONFIG).save_pretrained(made)
    return made


def storage(name: str):
    options = FEW_BITS.get(name)
    return resolve("weights", {name.split()[0]: options} if options else name)


def adapted(folder: Path, name: str, trained: str = "lora"):
    technique = resolve("trained", {trained: {"rank": 4}})
    return technique.prepare(storage(name).load(folder, "cpu"), SHAPE, 0)


def linears(model) -> dict:
    kinds = ("Linear4bit", "Linear8bitLt", "Float8Linear")
    named = layers_of(model).named_modules()
    return {name: each for name, each in named if type(each).__name__ in kinds}


def bytes_of(linear) -> int:
    """Of the weight and what its scales take."""
    state, weight = getattr(linear.weight, "quant_state", None), linear.weight
    size = weight.nbytes + getattr(linear, "scales", torch.empty(0)).nbytes
    if getattr(weight, "SCB", None) is not None:
        size += weight.SCB.nbytes
    if state is not None:
        size += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return size


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_whole_weights(folder, name):
    model = storage(name).load(folder, "cpu")
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, name)}


@pytest.mark.parametrize("name", FEW_BITS)
def test_the_bytes_are_those_declared(folder, name):
    found = linears(storage(name).load(folder, "cpu"))
    setting = storage(name).rewrite(resolve("trained", "lora").rewrite(MemorySetting()))
    declared = [setting.storage.bytes_of(each) for i in range(2) for each in SHAPE.linears_of(i)]
    assert len(found) == len(declared)  # neither the head nor anything else
    assert sum(map(bytes_of, found.values())) == pytest.approx(sum(declared), rel=1e-3)


def whole(linear) -> torch.Tensor:
    """What the linear computes with, as its output for every unit vector."""
    return linear(torch.eye(linear.in_features)).T.detach().double()


def original(folder: Path) -> dict[str, torch.Tensor]:
    model = storage("float32").load(folder, "cpu")
    named = layers_of(model).named_parameters()
    return {n.removesuffix(".weight"): w.detach() for n, w in named if w.dim() == 2}


def test_nf4_takes_the_nearest_of_its_numbers(folder):
    """Off by half the largest gap of its 16 numbers at most, times the block's maximum."""
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type

    numbers = get_4bit_type("nf4", device="cpu").double()
    given = original(folder)
    for name, linear in linears(storage("nf4 plain").load(folder, "cpu")).items():
        weight = given[name].bfloat16().double()
        blocks = weight.view(-1, 64)
        most = blocks.abs().amax(dim=1, keepdim=True)
        nearest = ((blocks / most).unsqueeze(-1) - numbers).abs().argmin(-1)
        naive = (numbers[nearest] * most).view_as(weight)
        stored = dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
        assert torch.allclose(stored, naive, rtol=2**-8, atol=0.0)
        gap = float(numbers.diff().max()) / 2
        assert ((stored - weight).abs().view(-1, 64) <= (gap + 2**-8) * most).all()


@pytest.mark.parametrize("shape", [(64, 32), (32, 96), (33, 64), (160, 688)])
def test_whether_this_cpu_reads_what_was_stored(shape):
    """On some it does also where it is refused; the refusal is for the others."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    off = float((dequantize_4bit(stored, state) - weight).norm() / weight.norm())
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or shape[1] % 64 == 0:
        assert off < 0.1
    refused = ModelShape.from_config(TINY["llama"] | {"intermediate_size": shape[1]})
    if shape[1] % 64:
        assert f"rows of {shape[1]}" in storage("nf4").refuses_model(refused, "cpu")
        assert storage("nf4").refuses_model(refused, "cuda") is None


def test_nf4_refuses_rows_that_cannot_be_evaluated():
    few_rows = {"num_key_value_heads": 1, "intermediate_size": 128}
    odd = ModelShape.from_config(TINY["llama"] | few_rows)
    assert storage("nf4").refuses_model(SHAPE, "cpu") is None
    assert "multiple of 32" in storage("nf4").refuses_model(odd, "cpu")


def test_int8_is_off_by_half_a_step_of_its_row(folder):
    given = original(folder)
    for name, linear in linears(storage("int8").load(folder, "cpu")).items():
        weight = given[name].bfloat16().half().double()
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((whole(linear) - weight).abs() <= step * (0.5 + 127 * 2**-10)).all()


def test_fp8_is_off_by_a_sixteenth_of_a_weight(folder):
    given = original(folder)
    for name, linear in linears(storage("fp8").load(folder, "cpu")).items():
        weight = given[name].bfloat16().double()
        least = linear.scales.double() * 2**-10
        assert ((whole(linear) - weight).abs() <= weight.abs() / 16 * (1 + 1e-6) + least).all()


@pytest.mark.parametrize("name", FEW_BITS)
def test_an_adapter_on_few_bits(folder, tmp_path, name):
    """Trains, in the bytes that are priced; is saved, and loaded by stock PEFT on the same base."""
    technique = resolve("trained", {"lora": {"rank": 4}})
    setting = technique.rewrite(MemorySetting(micro_batch=4, sequence=96))
    setting = storage(name).rewrite(setting)
    model, inputs = adapted(folder, name).train(), batch(4, 96, masked=True)
    kept = priced_saved_bytes(SHAPE, setting, (4,), head=True)[0]
    assert kept == pytest.approx(saved_bytes(model, inputs), rel=2e-3)
    first = model(**inputs).loss
    first.backward()
    gradients = [w.grad for w in model.parameters() if w.requires_grad]
    assert all(torch.isfinite(each).all() for each in gradients)
    assert any(each.abs().max() > 0 for each in gradients)
    with torch.no_grad():
        for weight, gradient in zip(
            (w for w in model.parameters() if w.requires_grad), gradients, strict=True
        ):
            weight -= 1.0 * gradient
    assert model(**inputs).loss < first
    model.zero_grad()
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    phases = account(SHAPE, setting).phases
    held = ("weights", "adapter", "optimizer_states")
    beside = max(
        sum(size for term, size in phases[phase].items() if term not in held)
        for phase in ("loss", "backward")
    )
    assert beside - input_bytes(inputs) == pytest.approx(measured, rel=0.03)
    assert not technique.save(model, tmp_path)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(storage(name).load(folder, "cpu"), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("name", FEW_BITS)
def test_the_logits_are_near_those_of_whole_weights(folder, name):
    with torch.no_grad():
        wanted = storage("float32").load(folder, "cpu").eval()(IDS).logits
        found = storage(name).load(folder, "cpu").eval()(IDS).logits.float()
    assert (found - wanted).norm() / wanted.norm() < LOGITS_OFF[name.split()[0]]


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_loftq_begins_nearer_to_the_weights(folder, tmp_path, name):
    """By the most that a matrix of its rank can: what is left are the other singular values."""
    given = original(folder)
    model = adapted(folder, name, "loftq")
    layers = {n: m for n, m in layers_of(model).named_modules() if hasattr(m, "lora_A")}
    from peft.utils.integrations import dequantize_module_weight

    for path, layer in layers.items():
        held = dequantize_module_weight(layer.get_base_layer()).double()
        a, b = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
        lost = given[path].double() - held
        left = lost - layer.scaling["default"] * b @ a
        values = torch.linalg.svdvals(lost)
        assert float(left.norm()) == pytest.approx(float(values[4:].norm()), rel=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(storage(name).load(folder, "cpu"), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


def test_what_few_bits_refuse():
    setting = {
        name: resolve("trained", name).rewrite(MemorySetting())
        for name in ("pissa", "loftq", "dora")
    }
    for name in ("nf4", "int8", "fp8"):
        assert "cannot follow" in storage(name).refuses(setting["pissa"])
        assert "cannot be trained themselves" in storage(name).refuses(MemorySetting())
    for name in ("float32", "bfloat16"):
        assert "lose nothing" in storage(name).refuses(setting["loftq"])
        assert storage(name).refuses(setting["pissa"]) is None
    assert "cannot read fp8" in storage("fp8").refuses(setting["dora"])
    assert storage("nf4").refuses(setting["loftq"]) is None
