"""Tables of bench/fits.py, plans of bench/gpu_plans.py, and the page that shows them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan import MemoryPlan
from thrifty.core.resolve import all_names
from thrifty.costs.allocator import device_memory
from thrifty.costs.hardware import GIB, load_device
from thrifty.costs.memory import account
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.memory_plan import Techniques

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import fits
import gpu_plans

ROOT = Path(__file__).parents[1]
WHAT = {figure.name: figure for figure in reversed(fits.FIGURES)}


def test_all_weights_of_8b_are_trained_on_24_gb():
    found = fits.best_of_all_weights(
        ModelShape.from_config(fits.CONFIGS["Llama-3-8B"]), fits.GPUS["24 GB"]
    )
    assert found is not None
    assert found.runs
    assert found.setting.adapter is None
    assert not found.setting.zeroth_order
    assert found.peak_memory_bytes < 23.5e9


def test_adapters_on_70b_are_trained_on_48_gb():
    found = fits.best(ModelShape.from_config(fits.CONFIGS["Llama-3.1-70B"]), fits.GPUS["48 GB"], {})
    plan = fits.facts(found)
    assert plan is not None
    assert plan["peak_bytes"] < 47.5 * GIB
    assert plan["tokens_per_second"] > 0
    assert sum(plan["bytes_by_term"].values()) == pytest.approx(plan["peak_bytes"])
    assert sum(map(float, fits.parts(plan).split("+"))) == pytest.approx(
        plan["peak_bytes"] / GIB, abs=0.3
    )


@pytest.mark.parametrize("name", ["AdamW", "QLoRA", "APOLLO, in the backward"])
def test_a_joint_plan_takes_less_and_no_longer(name):
    """Its numbers are those of the setting that its techniques make."""
    figure = WHAT[name]
    found = fits.compared(figure)
    other = found["joint"]
    assert other["memory_ratio"] < fits.CLEARLY
    assert other["seconds_ratio"] <= 1.0 + 1e-6
    assert other["worth_ratio"] >= min(fits.WORTH) - 1e-9
    adapter = next(iter(figure.memory["trained"].values())) if name == "QLoRA" else None
    techniques = dict(other["techniques"])
    if adapter:
        dtype = "bfloat16" if "bf16 adapters" in other["plan"] else "float32"
        techniques["trained"] = {"lora": {**adapter, "adapter_dtype": dtype}}
    rows, times = map(int, other["plan"].split()[-1].split("x"))
    assert rows * times == figure.micro_batch
    start = replace(figure.start, micro_batch=rows, gradient_accumulation_steps=times)
    setting = Techniques.of(MemoryPlan(**techniques)).setting(start)
    peak = account(figure.shape, setting).peak_memory_bytes
    assert other["allocated"] == pytest.approx(peak, rel=0.02)
    seconds = step_seconds(figure.shape, setting, load_device(figure.device)) * times
    assert other["seconds"] == pytest.approx(seconds, rel=1e-6)


def test_quantities_are_those_that_were_published():
    figure = WHAT["BAdam"]
    assert figure.of(10 * GIB) == device_memory(10 * GIB, "cuda").device
    assert WHAT["AdamW"].of(10 * GIB) == 10 * GIB


def test_every_plan_is_one_and_has_a_price():
    shape = ModelShape.from_config(fits.CONFIGS["Llama-3-8B"])
    assert len(gpu_plans.PLANS) >= 15
    for rows, memory in gpu_plans.PLANS.values():
        start = replace(WHAT["AdamW"].start, micro_batch=rows, sequence=2048, masked=True)
        assert gpu_plans.predicted(memory, shape, start) > 0


def test_plans_are_trained_and_timed(tmp_path):
    base = tmp_path / "base"
    gpu_plans.make({"make": gpu_plans.TINY, "base": str(base)}, "cpu")
    device = gpu_plans.Here.found("cpu")
    for name in ("lora", "badam", "mezo"):
        rows, memory = gpu_plans.PLANS[name]
        found = gpu_plans.under(gpu_plans.here, base, name, memory, rows, 32, device)
        assert found["tokens_per_second"] > 0
        assert found["predicted"] > 0
    refused = gpu_plans.PLANS["adamw_offload"]
    found = gpu_plans.under(gpu_plans.here, base, "offload", refused[1], refused[0], 32, device)
    assert "does not go here" in found["left_out"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_of_it_runs_on_a_cpu(tmp_path, capsys):
    gpu_plans.show(tmp_path, "cpu", 500.0, tiny=True)
    printed = capsys.readouterr().out
    for name in (*gpu_plans.SOME, *gpu_plans.PEERS):
        assert name in printed
    assert not list(tmp_path.iterdir())


def test_the_page_names_every_technique():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for kind in MEMORY_KINDS:
        section = page.partition(f"`training.memory.{kind}`)\n")[2].partition("\n#")[0]
        rows = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
        assert rows == set(all_names(kind)), kind
