"""Seconds, joules and dollars: the roofline's shape, and a measured machine's steps."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import yaml
from published import PUBLISHED, TINY

from thrifty.costs import hardware
from thrifty.costs.hardware import DEVICES, dollars_per_hour, keep, load_device
from thrifty.costs.memory import Adapter, MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import forward_seconds, joules, rate, step_seconds, step_terms

SHAPE = ModelShape.from_config(PUBLISHED["Llama-3-8B"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's own measurements and prices."""
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path))
    hardware._price_files.cache_clear()
    yield tmp_path
    hardware._price_files.cache_clear()


def setting(**fields):
    return MemorySetting(**{"sequence": 2048, "masked": False, "device_kind": "cuda"} | fields)


def test_a_large_step_runs_at_the_stated_efficiency():
    from thrifty.costs.flops import train_flops

    h100 = load_device("h100")
    seconds = step_seconds(SHAPE, setting(micro_batch=4), h100)
    mfu = train_flops(SHAPE, 4, 2048, causal=True) / seconds / h100.flops_per_second["bfloat16"]
    assert 0.3 < mfu < 0.55


def test_what_costs_more_takes_longer():
    a100 = load_device("a100")
    base = step_seconds(SHAPE, setting(), a100)
    assert step_seconds(SHAPE, setting(recompute=True), a100) > 1.2 * base
    assert step_seconds(SHAPE, setting(adapter=Adapter()), a100) < base
    assert step_seconds(SHAPE, setting(masked=True), a100) > base
    assert step_seconds(SHAPE, setting(micro_batch=2), a100) > 1.8 * base
    assert step_seconds(SHAPE, setting(), a100, "forward") < 0.4 * base
    assert step_seconds(SHAPE, setting(), load_device("t4")) > 5 * base
    assert forward_seconds(SHAPE, 2.4, 2048, "bfloat16", a100) == pytest.approx(
        1.2 * step_seconds(SHAPE, setting(micro_batch=2), a100, "forward")
    )


def test_small_models_are_ruled_by_launches():
    shape, device = ModelShape.from_config(TINY["llama"]), load_device("h100")
    products, memory, launches, _ = step_terms(shape, setting(sequence=16), device, "train")
    assert launches > 10 * (products + memory)


def test_rates_follow_the_measured_curve():
    device = replace(load_device("t4"), matmul_rates={"float32": {64: 1e9, 1024: 4e9}})
    assert rate(device, "float32", 256) == pytest.approx(2e9)
    assert rate(device, "float32", 16) == pytest.approx(0.5e9)
    assert rate(device, "float32", 4096) == pytest.approx(4e9)


def measured(**rates):
    """A CPU whose products alone take time."""
    rates = {"matmul_rates": {"float32": {16: 1e9}, "bfloat16": {16: 1e8}}} | rates
    plain = {"bytes_per_second": 1e30, "operation_seconds": 0.0, "fault_seconds": 0.0}
    return replace(load_device(None), **plain, **rates)


def test_gradients_take_the_rates_of_the_backward():
    shape = ModelShape.from_config(TINY["llama"])
    on_cpu = {"device_kind": "cpu", "sequence": 64, "dtype": "bfloat16"}

    def products(kind="train", gradients=None, **fields):
        rates = {name: {"bfloat16": {16: rate}} for name, rate in (gradients or {}).items()}
        device = measured(gradient_rates=rates)
        return step_terms(shape, setting(**on_cpu, **fields), device, kind)[0]

    assert products("forward") == products("forward", {"input": 1.0, "weight": 1.0})
    half = 0.5e8  # of what the forward reaches
    of_input = products(gradients={"input": half}) - products()
    of_weight = products(gradients={"weight": half}) - products()
    assert of_input == pytest.approx(of_weight, rel=0.1)  # but for the embedding's
    assert products("forward") < of_input + of_weight < 2.1 * products("forward")
    lora = {"adapter": Adapter(rank=16)}  # whose own products are in float32
    assert products(gradients={"weight": half}, **lora) == products(**lora)
    assert products(gradients={"input": half}, **lora) > products(**lora)
    assert products(gradients={"attention": half}) > products()


def test_where_a_dtype_is_emulated_the_weight_s_size_counts():
    shape = ModelShape.from_config(TINY["llama"])
    on_cpu = setting(device_kind="cpu", sequence=64, dtype="bfloat16")
    curve = {"bfloat16": {16: 1e9, 1024: 1e7}}
    plain = measured(matmul_rates=curve)
    emulated = replace(plain, emulated=("bfloat16",))
    seconds = [step_terms(shape, on_cpu, device, "forward")[0] for device in (plain, emulated)]
    assert seconds[0] < seconds[1]  # a weight's side is never less than its smaller dimension


def test_adapters_in_float32_take_its_rate_where_it_was_measured():
    shape = ModelShape.from_config(TINY["llama"])
    on_cpu = {"device_kind": "cpu", "sequence": 64, "dtype": "bfloat16"}
    wide, narrow = (
        setting(**on_cpu, adapter=Adapter(rank=16), adapter_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    device = measured()
    assert (
        step_terms(shape, wide, device, "train")[0] < step_terms(shape, narrow, device, "train")[0]
    )
    h100 = load_device("h100")
    there = (replace(each, device_kind="cuda") for each in (wide, narrow))
    one, other = (step_terms(shape, each, h100, "train")[0] for each in there)
    assert one == other


def test_large_buffers_pay_for_their_pages_on_a_cpu():
    shape = ModelShape.from_config(TINY["llama"] | {"vocab_size": 50_000})
    cpu = load_device(None)
    few, many = (
        step_terms(shape, setting(micro_batch=n, sequence=128, device_kind="cpu"), cpu, "forward")[
            1
        ]
        for n in (1, 4)  # logits of 24 and of 98 MiB
    )
    assert many > 5 * few


def test_a_price_takes_microseconds():
    device = load_device("h100")
    step_seconds(SHAPE, setting(), device)
    start = time.perf_counter()
    for sequence in range(1, 301):
        step_seconds(SHAPE, setting(sequence=sequence), device)
    assert time.perf_counter() - start < 0.3


def test_joules_and_dollars(cache):
    h100 = load_device("h100")
    assert joules(10.0, h100) == 7000.0
    assert joules(10.0, replace(h100, tdp_watts=None)) is None
    listed = dollars_per_hour(h100)
    assert listed is not None
    assert listed > 0
    assert dollars_per_hour(load_device(None)) is None
    (cache / "prices.yaml").write_text("devices: {h100-sxm: {dollars_per_hour: 1.25}}")
    hardware._price_files.cache_clear()
    assert dollars_per_hour(h100) == 1.25


def test_every_price_is_dated_and_belongs_to_a_device():
    from pathlib import Path

    prices = yaml.safe_load(Path(hardware.__file__).with_name("prices.yaml").read_text())
    assert prices["devices"].keys() <= DEVICES.keys()
    for entry in prices["devices"].values():
        assert entry["dollars_per_hour"] > 0
        assert entry["date"]
        assert entry["source"]


def test_every_device_has_its_source():
    for device in DEVICES.values():
        assert device.source
        assert device.memory_bytes > 2**33
        assert device.flops_per_second["float32"] > 1e12


def test_unknown_devices_are_clear_errors():
    with pytest.raises(ValueError, match=r"hint: did you mean h100\? known are .*h100") as error:
        load_device("h1000")
    assert "thrifty device" in str(error.value)


def test_the_local_device_is_kept(cache):
    assert not load_device(None).calibrated
    assert "not measured" in load_device("local").name
    measured = replace(
        load_device(None), name="local", calibrated=True, matmul_rates={"float32": {64: 1e9}}
    )
    keep(measured)
    assert load_device(None) == measured
    assert not [path for path in cache.iterdir() if path.name != "device.json"]
    (cache / "device.json").write_text(json.dumps({"version": 0}))
    assert not load_device(None).calibrated


@pytest.mark.slow
def test_a_measured_machine_predicts_its_steps():
    """Within 25% where the machine is quiet; a busy one drifts by more than that by itself."""
    import torch
    from tracing import build

    from thrifty.calibration import measure_device

    device = measure_device()
    ratios, spreads = [], []
    for hidden, layers, vocabulary, rows in ((128, 4, 2048, 8), (256, 6, 4096, 4)):
        config = TINY["llama"] | {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": 11 * hidden // 4,
            "vocab_size": vocabulary,
        }
        model = build(config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(0, vocabulary, (rows, 256))
        spent = []
        for _ in range(4):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            spent.append(time.perf_counter() - start)
        one = MemorySetting(micro_batch=rows, sequence=256, dtype="float32", masked=False)
        measured = sorted(spent[1:])[1]
        ratios.append(step_seconds(ModelShape.from_config(config), one, device) / measured)
        spreads.append((max(spent[1:]) - min(spent[1:])) / measured)
    print(f"predicted / measured {ratios}, busy {device.machine_busy}, spreads {spreads}")
    if device.machine_busy or max(spreads) > 0.1:
        pytest.skip("machine busy")
    assert all(0.75 < ratio < 1.25 for ratio in ratios)
