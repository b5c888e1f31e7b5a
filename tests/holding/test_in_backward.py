"""Updates inside the backward against plain ones, and that no two gradients live at once."""

from __future__ import annotations

import io
import math
import weakref

import pytest
import torch
from tests.costs.tracing import allocated_peak, batch, build
from tests.holding.trained_llama import CONFIG, SHAPE, groups_of, llama, loss_of

from thrifty.core.resolve import method_class, resolve
from thrifty.costs.held import state_bytes
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.planner import MAX_LEARNING_RATE

NAMES = ("lomo", "adalomo")
RATES = {"lomo": 0.1, "adalomo": 1e-2}


def optimizer_of(name, model, rate=None):
    return resolve("states", name).optimizer(groups_of(model, rate or RATES[name]), SHAPE)


def run(model, optimizer, steps):
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lomo_is_plain_descent_bit_for_bit(tied):
    """A tied weight gets the gradients of both its uses at once."""
    models = []
    for kind in ("lomo", "sgd"):
        torch.manual_seed(0)
        model = build(CONFIG | {"tie_word_embeddings": tied})
        if kind == "lomo":
            optimizer = optimizer_of("lomo", model)
        else:
            optimizer = torch.optim.SGD(groups_of(model))
        models.append((model, run(model, optimizer, range(4))))
    assert models[0][1] == models[1][1]
    assert same(models[0][0], models[1][0])


def test_adalomo_is_the_paper_s_formula():
    """In float64, one step after the other."""
    generator = torch.Generator().manual_seed(0)
    for size in ((6, 4), (5,)):
        start = torch.randn(size, generator=generator, dtype=torch.float64)
        weight = torch.nn.Parameter(start.clone())
        group = {"params": [("weight", weight)], "lr": 0.1, "weight_decay": 0.3}
        optimizer = resolve("states", "adalomo").optimizer([group], SHAPE)
        w, v = start.clone(), [torch.zeros(()) for _ in range(2)]
        for step in range(1, 4):
            g = torch.randn(size, generator=generator, dtype=torch.float64)
            (weight * g).sum().backward()
            optimizer.step()
            beta, squares = 1 - step**-0.8, g**2 + 1e-30
            if len(size) == 2:
                means = squares.mean(dim=1), squares.mean(dim=0)
                v = [beta * old + (1 - beta) * new for old, new in zip(v, means, strict=True)]
                second = torch.outer(v[0], v[1]) / v[0].mean()
            else:
                v = [beta * v[0] + (1 - beta) * squares]
                second = v[0]
            u = g / second.sqrt()
            u = u / max(1.0, float(u.square().mean().sqrt()))
            rate = 0.1 * max(1e-3, float(w.square().mean().sqrt()))
            w = w * (1 - rate * 0.3) - rate * u
            torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-7)


def test_small_updates_of_bfloat16_weights_are_not_lost_by_adalomo():
    """At a rate of a twentieth of what bfloat16 tells apart, the mean of 4,096 weights goes where
    float32 takes each of them; rounded to nearest none would move."""
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        group = {"params": [("weight", weight)], "lr": 2.0**-12, "weight_decay": 0.0}
        optimizer = resolve("states", "adalomo").optimizer([group], SHAPE)
        for _ in range(50):
            (weight * torch.ones(64, 64, dtype=dtype)).sum().backward()
            optimizer.step()
        means[dtype] = float(weight.detach().double().mean())
    assert means[torch.float32] == pytest.approx(1 - 50 * 2.0**-12, abs=1e-4)
    # A standard error of 50 draws of 2^-8 each: sqrt(50 / 16 / 4096) 2^-8 at most.
    assert means[torch.bfloat16] == pytest.approx(means[torch.float32], abs=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_gradients_live_at_once(name):
    model = llama("float32")
    optimizer = optimizer_of(name, model)
    alive, most = weakref.WeakSet(), 0
    update = type(optimizer).update

    def watched(name, weight, gradient, group):
        nonlocal most
        alive.add(gradient.untyped_storage())
        most = max(most, len(alive))
        assert all(other.grad is None for other in model.parameters())
        update(optimizer, name, weight, gradient, group)

    optimizer.update = watched
    loss_of(model).backward()
    assert most == 1


@pytest.mark.parametrize("name", NAMES)
def test_its_bytes_are_those_declared(name):
    """States to the byte, and the peak of a step that is all gradients."""
    config = CONFIG | {"num_hidden_layers": 4, "vocab_size": 2048}
    shape, model, inputs = ModelShape.from_config(config), build(config), batch(1, 32)
    optimizer = optimizer_of(name, model)
    plain = MemorySetting(sequence=32, dtype="float32", masked=False)
    setting = resolve("states", name).rewrite(plain)

    def step():
        model(**inputs).loss.backward()
        optimizer.step()

    step()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    assert kept == state_bytes(shape, setting)
    seen = account(shape, setting)
    held = sum(seen.phases["loss"][term] for term in ("weights", "optimizer_states"))
    beside = seen.peak_memory_bytes - held - sum(each.nbytes for each in inputs.values())
    assert beside == pytest.approx(allocated_peak(step), rel=0.05)
    without = account(shape, plain).peak_memory_bytes - beside
    assert without > 2 * sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(name, dtype):
    through, stopped = llama(dtype), llama(dtype)
    optimizer = optimizer_of(name, through)
    optimizer.max_grad_norm = 0.5
    run(through, optimizer, range(4))
    first = optimizer_of(name, stopped)
    first.max_grad_norm = 0.5
    run(stopped, first, range(2))
    file = io.BytesIO()
    torch.save([stopped.state_dict(), first.state_dict()], file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    resumed = llama(dtype)
    resumed.load_state_dict(weights)
    second = optimizer_of(name, resumed)
    second.max_grad_norm = 0.5
    second.load_state_dict(states)
    assert second.norm == first.norm > 0.5
    run(resumed, second, range(2, 4))
    assert same(resumed, through)


def test_gradients_are_clipped_by_the_norm_of_the_step_before():
    clipped, plain = llama("float32"), llama("float32")
    optimizer, reference = optimizer_of("lomo", clipped), torch.optim.SGD(groups_of(plain, 0.1))
    optimizer.max_grad_norm = 0.01
    norm = None
    for _ in range(3):
        loss_of(clipped).backward()
        optimizer.step()
        loss_of(plain).backward()
        gradients = [weight.grad for weight in plain.parameters()]
        now = float(torch.nn.utils.get_total_norm(gradients))
        for gradient in gradients:
            gradient.mul_(1.0 if norm is None else 0.01 / norm)
        reference.step()
        reference.zero_grad()
        norm = now
        assert optimizer.norm == pytest.approx(norm, rel=1e-5)
        for one, other in zip(clipped.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_enters_no_weight(name, value):
    model = llama("float32")
    optimizer = optimizer_of(name, model)
    before = [weight.detach().clone() for weight in model.parameters()]
    (loss_of(model) * value).backward()
    with pytest.raises(FloatingPointError, match=r"not finite.*\nhint: the last checkpoint"):
        optimizer.step()
    for weight, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
        assert weight.grad is None
    run(model, optimizer, range(1))  # and it can go on


def test_it_can_be_taken_off():
    model = llama("float32")
    optimizer = optimizer_of("lomo", model)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer.detach()
    loss_of(model).backward()
    for weight, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
        assert weight.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name):
    model = llama("float32")
    losses = run(model, optimizer_of(name, model), [0] * 30)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", [*NAMES, "sgd", "adamw"])
def test_it_learns_at_the_rate_that_a_plan_gives_it(name):
    """What the usual rate of AdamW is times, by its own definition of an update."""
    model = llama("float32")
    rate = MAX_LEARNING_RATE * method_class("states", name).learning_rate
    optimizer, losses = optimizer_of(name, model, rate), []
    for _ in range(40):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_refuses_what_cannot_wait(name):
    technique = resolve("states", name)
    assert "cannot be accumulated" in technique.refuses(
        MemorySetting(gradient_accumulation_steps=2)
    )
    assert "without states" in technique.refuses(MemorySetting(zeroth_order=True))
