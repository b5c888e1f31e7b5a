"""Zeroth order: the estimate against the dense one, its mean, and weights that stay as they are."""

from __future__ import annotations

import io
import math

import pytest
import torch
from tests.costs.tracing import allocated_peak, batch, build
from tests.holding.trained_llama import CONFIG, SHAPE, groups_of, llama, loss_of

from thrifty.core.resolve import resolve
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.holding.zeroth_order import Moved, ZerothOrder

EPS = 1e-3


def optimizer_of(model, rate=1e-3, seed=5):
    return resolve("trained", "mezo").optimizer(groups_of(model, rate), SHAPE, seed)


def direction(optimizer, step=0):
    """z of each weight, all of it."""
    named = {name: weight for name, weight, _ in optimizer._weights()}
    found = {}
    for name, weight in named.items():
        nothing = torch.nn.Parameter(torch.zeros_like(weight))
        with torch.no_grad(), Moved({name: nothing}, optimizer.seed, step, 1.0):
            found[name] = nothing + 0.0
    return found


def test_an_update_is_that_of_the_dense_direction():
    """In float64: the whole direction made once, the weights moved by it as one vector."""
    model, naive = llama("float32").double(), llama("float32").double()
    optimizer = optimizer_of(model, rate=0.1)
    for step in range(3):
        z = direction(optimizer, step)
        estimated = optimizer.estimate(lambda: loss_of(model))
        optimizer.step()
        weights = dict(naive.named_parameters())
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                for name, weight in weights.items():
                    weight.add_(z[name], alpha=sign * EPS)
                sides.append(float(loss_of(naive)))
                for name, weight in weights.items():
                    weight.sub_(z[name], alpha=sign * EPS)
            slope = (sides[0] - sides[1]) / (2 * EPS)
            assert float(estimated) == pytest.approx(sum(sides) / 2, rel=1e-6)
            for name, weight in weights.items():
                decay = 0.1 if weight.dim() > 1 else 0.0
                weight.sub_(0.1 * (slope * z[name] + decay * weight))
        for one, other in zip(model.parameters(), naive.parameters(), strict=True):
            # The loss itself is made in float32.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_estimate_is_unbiased():
    """Of a quadratic, whose slopes are exact: over many seeds, within its standard error."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, generator=generator, dtype=torch.float64)
    slopes = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    gradient = slopes * start
    moves = []
    for seed in range(1500):
        weight = torch.nn.Parameter(start.clone())
        group = {"params": [("w", weight)], "lr": 1.0, "weight_decay": 0.0}
        optimizer = ZerothOrder([group], eps=EPS, seed=seed)
        optimizer.estimate(lambda weight=weight: (slopes * weight**2).sum() / 2)
        optimizer.step()
        moves.append(start - weight.detach())
    moves = torch.stack(moves)
    stderr = moves.std(dim=0) / len(moves) ** 0.5
    off = (moves.mean(dim=0) - gradient) / stderr
    assert off.abs().max() < 4
    assert off.square().mean() < 3
    # E |g|^2 of the estimate is (d + 2) |gradient|^2 for a normal direction.
    ratio = moves.square().sum(dim=1).mean() / gradient.square().sum()
    assert float(ratio) == pytest.approx(14, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_as_they_are_bit_for_bit(dtype):
    """Moved in place, as the authors do, they drift: by up to a unit in the last place a step."""
    model = llama(dtype)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = optimizer_of(model)
    optimizer.estimate(lambda: loss_of(model))
    drifted = 0
    for (name, weight), was in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(weight, was), name
        z = torch.randn_like(weight)
        there = was.clone().add_(z, alpha=EPS).sub_(z, alpha=2 * EPS).add_(z, alpha=EPS)
        drifted += int((there != was).sum())
    assert drifted > 0.2 * sum(weight.numel() for weight in before)


def test_every_use_of_a_tied_weight_is_moved_alike():
    torch.manual_seed(0)
    model = build(CONFIG | {"tie_word_embeddings": True})
    optimizer = optimizer_of(model)
    z = direction(optimizer)
    with torch.no_grad():
        with Moved(dict(model.named_parameters()), optimizer.seed, 0, EPS) as moved:
            seen = loss_of(model)
        assert moved.seen == set(z)
        for name, weight in model.named_parameters():
            weight.add_(z[name], alpha=EPS)
        torch.testing.assert_close(seen, loss_of(model), rtol=1e-6, atol=0)


def test_micro_batches_add_up_along_one_direction():
    whole, parted = llama("float32"), llama("float32")
    one, two = optimizer_of(whole, 0.1), optimizer_of(parted, 0.1)
    inputs = batch(4, 32)
    inputs["input_ids"] = inputs["labels"] = torch.arange(128).view(4, 32) % 7

    def part(model, rows):
        return model(**{name: value[rows] for name, value in inputs.items()}).loss

    one.estimate(lambda: part(whole, slice(0, 4)))
    for rows in (slice(0, 2), slice(2, 4)):
        two.estimate(lambda rows=rows: part(parted, rows) / 2)
    one.step()
    two.step()
    for a, b in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_dropout_is_the_same_on_both_sides():
    torch.manual_seed(0)
    model = build(
        dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=256, resid_pdrop=0.5)
    )
    optimizer = resolve("trained", "mezo").optimizer(groups_of(model, 0.0), SHAPE, 5)
    slopes = []
    for _ in range(2):
        torch.manual_seed(3)
        optimizer.estimate(lambda: loss_of(model))
        slopes.append(optimizer._slope)
        optimizer._slope = 0.0
    assert slopes[0] == slopes[1]
    assert abs(slopes[0]) < 20  # of other draws it is some 100, their difference over 2 eps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype):
    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.estimate(lambda: loss_of(model))
            optimizer.step()
            optimizer.zero_grad()

    through = llama(dtype)
    optimizer = optimizer_of(through)
    run(through, optimizer, 2)
    file = io.BytesIO()
    torch.save([through.state_dict(), optimizer.state_dict()], file)
    run(through, optimizer, 2)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    again = llama(dtype)
    second = optimizer_of(again)
    again.load_state_dict(weights)
    second.load_state_dict(states)
    run(again, second, 2)
    for one, other in zip(through.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_weights_follow_in_the_mean():
    """An update of a hundredth of their last place, a hundred times."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    group = {"params": [("w", weight)], "lr": 1.0, "weight_decay": 2**-7 / 100}
    optimizer = ZerothOrder([group], eps=EPS, seed=0)
    for _ in range(100):
        optimizer.estimate(lambda: (weight * 0.0).sum())
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 2**-7, abs=5e-4)


@pytest.mark.long
def test_it_trains():
    model = llama("float32")
    optimizer = optimizer_of(model, rate=1e-3)
    losses = []
    for _ in range(60):
        losses.append(float(optimizer.estimate(lambda: loss_of(model))))
        optimizer.step()
    assert sum(losses[-10:]) < 0.98 * sum(losses[:10])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_an_error(value):
    model = llama("float32")
    optimizer = optimizer_of(model)
    with pytest.raises(FloatingPointError, match="not finite; nothing was updated\nhint: "):
        optimizer.estimate(lambda: loss_of(model) * value)


def test_a_weight_that_no_function_is_given_is_an_error():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    group = {"params": [("a", used), ("b", unused)], "lr": 0.1, "weight_decay": 0.0}
    optimizer = ZerothOrder([group], eps=EPS, seed=0)
    optimizer.estimate(lambda: used.sum())
    with pytest.raises(ValueError, match="b was not used by functions of torch\nhint: freeze it"):
        optimizer.step()


@pytest.mark.parametrize("rows", [1, 8])
def test_its_bytes_are_those_declared(rows):
    config = CONFIG | {"num_hidden_layers": 3, "vocab_size": 1024}
    shape, model = ModelShape.from_config(config), build(config)
    inputs = batch(rows, 64, masked=True)
    optimizer = optimizer_of(model)

    def step():
        optimizer.estimate(lambda: model(**inputs).loss)
        optimizer.step()

    step()
    assert not optimizer.state
    setting = MemorySetting(micro_batch=rows, sequence=64, dtype="float32")
    seen = account(shape, resolve("trained", "mezo").rewrite(setting))
    weights = sum(weight.nbytes for weight in model.parameters())
    beside = seen.peak_memory_bytes - weights - sum(each.nbytes for each in inputs.values())
    assert beside == pytest.approx(allocated_peak(step), rel=0.05)
