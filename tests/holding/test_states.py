"""Every technique of the optimizer's states that runs: resume, bytes, rates, and that it trains."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tests.costs.tracing import allocated_peak
from tests.holding.trained_llama import (
    DECAY,
    RUNNING,
    SHAPE,
    give_gradients,
    groups_of,
    llama,
    loss_of,
    technique,
)
from torch.optim.lr_scheduler import LambdaLR

from thrifty.costs.held import state_bytes, step_bytes
from thrifty.costs.setting import MemorySetting
from thrifty.state_check import check_states

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
COMPILES = ("adamw_4bit",)
"""At its first step, for a minute."""
CASES = [
    pytest.param(
        name, dtype, marks=pytest.mark.slow if name in COMPILES else (), id=f"{name}-{dtype}"
    )
    for name, dtype in RUNNING
]
RATES = {"sgd": 0.5, "lion": 3e-4, "lion_8bit": 3e-4, "galore": 4e-3, "q_galore": 4e-3}
"""That suit them; of the others 1e-3."""


def started(name: str, dtype: str, rate: float = 1e-3) -> tuple[torch.nn.Module, Any, LambdaLR]:
    model = llama(dtype)
    optimizer = technique(name).optimizer(groups_of(model, rate), SHAPE)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(model: torch.nn.Module, optimizer: Any, schedule: LambdaLR, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(value: Any) -> list[torch.Tensor]:
    """Every plain tensor in a state dict, those that others are made of in their place."""
    if hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
        return [part for name in value.__tensor_flatten__()[0] for part in [getattr(value, name)]]
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors(part)]
    return []


def test_techniques_are_tested():
    """The test would pass without any."""
    assert {("adamw", "float32"), ("adafactor", "bfloat16"), ("galore", "float32")} <= set(RUNNING)
    assert ("adamw_bf16", "float32") not in RUNNING


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("saved", [through_a_file, lambda state: state], ids=["file", "memory"])
def test_a_run_that_resumes_is_the_one_that_was_not_interrupted(name, dtype, saved):
    whole = started(name, dtype)
    train(*whole, range(6))
    model, optimizer, schedule = started(name, dtype)
    train(model, optimizer, schedule, range(3))
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    state, rates = saved(optimizer.state_dict()), saved(schedule.state_dict())
    torch.manual_seed(1)  # what came before an interruption is not had after it
    again, optimizer, schedule = started(name, dtype)
    again.load_state_dict(kept)
    optimizer.load_state_dict(state)
    schedule.load_state_dict(rates)
    train(again, optimizer, schedule, range(3, 6))
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    pairs = zip(tensors(whole[1].state_dict()), tensors(optimizer.state_dict()), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_bytes_of_its_states_are_the_declared_ones(name, dtype):
    model, optimizer, schedule = started(name, dtype)
    train(model, optimizer, schedule, range(2))
    found = [each for each in tensors(optimizer.state_dict()["state"]) if each.dim()]
    sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
    setting = technique(name).rewrite(MemorySetting(dtype=dtype))
    declared = state_bytes(SHAPE, setting)
    print(f"{name} {dtype}: {sum(sizes.values()):,} bytes, declared {declared:,.0f}")
    assert sum(sizes.values()) == pytest.approx(declared, rel=0.05)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_states_wider_than_planned_are_refused(name, dtype):
    """As FSDP once made 8-bit Adam's: each tensor of a large weight's states in float32."""
    weight = torch.nn.Parameter(torch.randn(128, 192).to(getattr(torch, dtype)))
    group = {"params": [("layers.0.mlp.up_proj.weight", weight)], "lr": 1e-3, "weight_decay": 0.0}
    optimizer = technique(name).optimizer([group], SHAPE)
    setting = technique(name).rewrite(MemorySetting(dtype=dtype))
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    check_states(optimizer, setting)
    if setting.states.matrix_bytes(128, 192, weight.element_size()) == 0:
        return  # it keeps none
    if (name, dtype) in {("adamw", "float32"), ("lion", "float32")}:
        return  # all is float32 already
    for state in optimizer.state.values():
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim():
                state[key] = torch.zeros(weight.shape)
    with pytest.raises(ValueError, match=rf"{name} keeps .*wider\nhint: plan with"):
        check_states(optimizer, setting)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_bytes_that_its_step_allocates_are_the_declared_ones(name, dtype):
    """Of the largest tensor, a head that is not projected, beside a small matrix that is."""
    shapes = {"layers.0.mlp.up_proj.weight": (16, 16), "lm_head.weight": (512, 1024)}
    weights = {
        key: torch.nn.Parameter(torch.randn(shape).to(getattr(torch, dtype)))
        for key, shape in shapes.items()
    }
    group = {"params": list(weights.items()), "lr": 1e-3, "weight_decay": DECAY}
    optimizer = technique(name).optimizer([group], SHAPE)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    optimizer.step()  # makes the states
    peak = allocated_peak(optimizer.step)
    setting = technique(name).rewrite(MemorySetting(dtype=dtype))
    declared = step_bytes(setting) * 512 * 1024
    print(f"{name} {dtype}: {peak:,} bytes in its step, declared {declared:,.0f}")
    assert peak == pytest.approx(declared, rel=0.05, abs=8192)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_rate_and_the_decay_are_those_of_the_group(name, dtype):
    """At a gradient of zero nothing moves but by the decay; at a rate of zero nothing at all."""
    model, optimizer, _ = started(name, dtype)
    before = {key: value.detach().double().clone() for key, value in model.named_parameters()}
    factor = 1.0
    schedule = LambdaLR(optimizer, lambda step: 50.0 * step)
    for rate in (0.0, 0.05, 0.1):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        factor *= 1 - rate * DECAY
        schedule.step()
    rounding = 1e-6 if dtype == "float32" else 2e-3
    for key, value in model.named_parameters():
        decays = factor if value.dim() > 1 else 1.0
        kept = float((value.detach().double() * before[key]).sum() / before[key].square().sum())
        assert kept == pytest.approx(decays, abs=rounding), key
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    give_gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.long
def test_the_loss_falls(name, dtype):
    model = llama(dtype)
    optimizer = technique(name).optimizer(groups_of(model, RATES.get(name, 1e-3)), SHAPE)
    losses = []
    for _ in range(20):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name} {dtype}: {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 1
