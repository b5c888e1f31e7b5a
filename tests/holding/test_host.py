"""AdamW on the host: AdamW bit for bit, what it keeps, and going on from a checkpoint."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.holding.trained_llama import SHAPE, give_gradients, groups_of, llama
from torch.optim.lr_scheduler import LambdaLR

from thrifty.core.resolve import resolve
from thrifty.costs.held import state_bytes, update_bytes
from thrifty.costs.setting import MemorySetting

DTYPES = ["float32", "bfloat16"]


def on_the_host(model, rate=1e-3):
    return resolve("states", "adamw_offload").optimizer(groups_of(model, rate), SHAPE)


def in_place(model, rate=1e-3):
    return resolve("states", "adamw").optimizer(groups_of(model, rate), SHAPE)


def train(model, optimizer, steps):
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step), last_epoch=-1)
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_adamw_bit_for_bit(dtype):
    one = llama(dtype)
    other = copy.deepcopy(one)
    train(one, in_place(one), range(5))
    train(other, on_the_host(other), range(5))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(next(other.parameters()), next(llama(dtype).parameters()))


def test_it_is_adamws_formula():
    """m = 0.9 m + 0.1 g, v = 0.999 v + 0.001 g^2; w <- (1 - r d) w - r m' / (sqrt(v') + eps), both
    without their bias."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7))
    group = {"params": [("weight", weight)], "lr": 0.02, "weight_decay": 0.1}
    optimizer = resolve("states", "adamw_offload").optimizer([group], SHAPE)
    wanted, first, second = weight.detach().double(), 0.0, 0.0
    for step in range(1, 5):
        weight.grad = torch.randn(5, 7)
        gradient = weight.grad.double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        wanted = (1 - 0.02 * 0.1) * wanted - 0.02 * first / (1 - 0.9**step) / root
        optimizer.step()
    assert weight.detach().double() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_goes_on_from_a_checkpoint_bit_for_bit(dtype):
    def step(model, optimizer, number):
        give_gradients(model, number)
        optimizer.step()

    straight = llama(dtype)
    optimizer = on_the_host(straight)
    for number in range(2):
        step(straight, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(straight)
    again = on_the_host(resumed, rate=7.0)  # the rate is the checkpoint's
    again.load_state_dict(torch.load(file, weights_only=True))
    for number in range(2, 4):
        step(straight, optimizer, number)
        step(resumed, again, number)
    pairs = zip(straight.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_keeps_is_what_is_priced(dtype):
    model = llama(dtype)
    optimizer = on_the_host(model)
    give_gradients(model, 0)
    optimizer.step()
    kept = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    assert {value.device.type for value in kept} == {"cpu"}
    setting = resolve("states", "adamw_offload").rewrite(
        MemorySetting(dtype=dtype, device_kind="cuda")
    )
    assert sum(value.nbytes for value in kept) == state_bytes(SHAPE, setting)
    gradients = sum(weight.nbytes for weight in model.parameters())
    assert update_bytes(SHAPE, setting) == (gradients, 0.0)


def test_a_weight_without_a_gradient_stays():
    model = llama("float32")
    optimizer = on_the_host(model)
    give_gradients(model, 0)
    still = next(model.parameters())
    before, still.grad = still.detach().clone(), None
    optimizer.step()
    assert torch.equal(still, before)
    assert still not in optimizer.state


def test_it_has_no_place_on_a_cpu_and_nothing_to_do_without_a_gradient():
    technique = resolve("states", "adamw_offload")
    assert "no other place" in technique.refuses(MemorySetting(device_kind="cpu"))
    assert technique.refuses(MemorySetting(device_kind="cuda")) is None
    assert "without states" in technique.refuses(MemorySetting(zeroth_order=True))
