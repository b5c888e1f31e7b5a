"""Addax: one step of a gradient and of an estimate, against the paper's formula made densely."""

from __future__ import annotations

import io

import pytest
import torch
from tests.costs.tracing import allocated_peak, batch, build
from tests.holding.test_zeroth_order import EPS, direction
from tests.holding.trained_llama import CONFIG, SHAPE, groups_of, llama, loss_of

from thrifty.core.resolve import resolve
from thrifty.costs.flops import forward_flops, step_flops, train_flops
from thrifty.costs.hardware import load_device
from thrifty.costs.memory import account, peaks
from thrifty.costs.setting import MemorySetting, parts_of
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.data.two_lengths import cut_at

ALPHA = 0.2


def technique(**options):
    return resolve("trained", {"addax": {"short": 16, "alpha": ALPHA} | options})


def optimizer_of(model, rate=0.1, **options):
    return technique(**options).optimizer(groups_of(model, rate), SHAPE, 5)


def long_loss(model):
    """Of other rows than ``loss_of`` has."""
    inputs = batch(2, 48)
    inputs["input_ids"] = inputs["labels"] = torch.arange(96).view(2, 48) % 5
    return model(**inputs).loss


def take(model, optimizer):
    optimizer.estimate(lambda: long_loss(model))
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def same(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_step_is_the_paper_s_formula():
    """In float64: theta - eta (alpha z g0 + (1 - alpha) g1), both made at theta."""
    model, naive = llama("float32").double(), llama("float32").double()
    optimizer = optimizer_of(model)
    for step in range(3):
        z = direction(optimizer._zeroth, step)
        take(model, optimizer)
        weights = dict(naive.named_parameters())
        naive.zero_grad()
        loss_of(naive).backward()
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                for name, weight in weights.items():
                    weight.add_(z[name], alpha=sign * EPS)
                sides.append(float(long_loss(naive)))
                for name, weight in weights.items():
                    weight.sub_(z[name], alpha=sign * EPS)
            slope = (sides[0] - sides[1]) / (2 * EPS)
            for name, weight in weights.items():
                decay = 0.1 if weight.dim() > 1 else 0.0
                weight.mul_(1 - 0.1 * (1 - ALPHA) * decay)
                weight.sub_(weight.grad, alpha=0.1 * (1 - ALPHA))
                weight.mul_(1 - 0.1 * ALPHA * decay).sub_(z[name], alpha=0.1 * ALPHA * slope)
        for one, other in zip(model.parameters(), naive.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_without_the_estimate_it_is_lomo_and_without_the_gradient_mezo():
    lomo, mezo = llama("float32"), llama("float32")
    plain = resolve("states", "lomo").optimizer(groups_of(lomo, 0.1), SHAPE)
    blind = resolve("trained", "mezo").optimizer(groups_of(mezo, 1e-3), SHAPE, 5)
    first, last = llama("float32"), llama("float32")
    no_estimate, no_gradient = optimizer_of(first, alpha=0.0), optimizer_of(last, 1e-3, alpha=1.0)
    for _ in range(3):
        take(first, no_estimate)
        loss_of(lomo).backward()
        plain.step()
        take(last, no_gradient)
        blind.estimate(lambda: long_loss(mezo))
        blind.step()
    assert same(first, lomo)
    assert same(last, mezo)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype):
    through = llama(dtype)
    optimizer = optimizer_of(through)
    for _ in range(2):
        take(through, optimizer)
    file = io.BytesIO()
    torch.save([through.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    again = llama(dtype)
    second = optimizer_of(again, rate=1.0)  # the saved one counts
    again.load_state_dict(weights)
    second.load_state_dict(states)
    for model, update in ((through, optimizer), (again, second)):
        for _ in range(2):
            take(model, update)
    assert same(through, again)


def test_it_trains():
    model = llama("float32")
    optimizer = optimizer_of(model, alpha=1e-3)
    before = float(long_loss(model).detach())
    for _ in range(20):
        take(model, optimizer)
    assert float(loss_of(model).detach()) < 2.0
    assert float(long_loss(model).detach()) < before


def test_a_gradient_that_is_not_finite_is_an_error():
    model = llama("float32")
    optimizer = optimizer_of(model)
    optimizer.estimate(lambda: long_loss(model))
    (loss_of(model) * float("inf")).backward()
    with pytest.raises(FloatingPointError, match="hint: "):
        optimizer.step()


def setting_of(**fields):
    start = MemorySetting(dtype="float32", sequence=64, **fields)
    return resolve("states", "lomo").rewrite(technique().rewrite(start))


@pytest.mark.parametrize("loss", ["whole", "chunked"])
@pytest.mark.parametrize("rows", [1, 8])
def test_its_bytes_are_those_declared(rows, loss):
    config = CONFIG | {"num_hidden_layers": 3, "vocab_size": 1024}
    shape, model = ModelShape.from_config(config), build(config)
    held = resolve("loss", {loss: {"tokens": 32} if loss == "chunked" else {}})
    held.hold(model)
    short, other = cut_at(16, batch(rows, 16 + 64, masked=True))
    optimizer = optimizer_of(model)

    def step():
        optimizer.estimate(lambda: model.eval()(**other).loss)
        model.train()(**short).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    setting = held.rewrite(setting_of(micro_batch=rows))
    weights = sum(weight.nbytes for weight in model.parameters())
    inputs = sum(each.nbytes for each in other.values())
    beside = account(shape, setting).peak_memory_bytes - weights - inputs
    assert beside == pytest.approx(allocated_peak(step), rel=0.05)


def test_costs_are_the_sums_of_both_parts_and_bytes_the_larger():
    setting, device = setting_of(micro_batch=4), load_device("h100")
    both = train_flops(SHAPE, 4, 16) + 2 * forward_flops(SHAPE, 4, 64)
    assert step_flops(SHAPE, setting) == both
    parts = parts_of(setting)
    seconds = sum(step_seconds(SHAPE, part, device) for part in parts)
    assert step_seconds(SHAPE, setting, device) == pytest.approx(seconds)
    peak = account(SHAPE, setting).peak_memory_bytes
    assert peak == max(account(SHAPE, part).peak_memory_bytes for part in parts)
    one, several = peaks(SHAPE, [setting], (1, 4))
    assert one[0, 1] == pytest.approx(peak)
    assert several.min() == float("inf")


def test_long_rows_take_less_than_lomo_needs_for_them():
    """What it is for: at 24 times the length, the bytes of the short rows' activations."""
    shape = ModelShape.from_config(CONFIG | {"num_hidden_layers": 8})
    start = MemorySetting(dtype="float32", sequence=384, micro_batch=8)
    lomo = resolve("states", "lomo")
    alone = account(shape, lomo.rewrite(start)).peak_memory_bytes
    mixed = account(shape, lomo.rewrite(technique().rewrite(start))).peak_memory_bytes
    assert mixed < alone / 2


@pytest.mark.parametrize("name", ["adamw", "sgd", "adalomo", "adamw_8bit"])
def test_other_optimizers_refuse_it(name):
    setting = technique().rewrite(MemorySetting())
    assert resolve("states", name).refuses(setting)
    assert resolve("states", "lomo").refuses(setting) is None


def test_it_refuses_devices_and_rows_shorter_than_its_short_ones():
    assert "devices" in technique().refuses(MemorySetting(replicas=2))
    assert "of 8 that a pack has" in technique().refuses(MemorySetting(sequence=8))
