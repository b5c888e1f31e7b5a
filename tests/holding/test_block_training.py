"""Parts of a model in turn: who has it, that nothing else moves or is held, and that it resumes."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from tests.costs.tracing import batch, build
from tests.holding.trained_llama import CONFIG, groups_of, loss_of

from thrifty.core.resolve import resolve
from thrifty.costs.held import state_bytes
from thrifty.costs.setting import MemorySetting, at_turn
from thrifty.costs.shape import ModelShape
from thrifty.holding.blockwise import load_on_host, parts_of, weights_of

LAYERS = 4
DEEP = CONFIG | {"num_hidden_layers": LAYERS}
SHAPE = ModelShape.from_config(DEEP)
NAMES = {
    "badam": {"switch_steps": 3},
    "badam of two": {"block_layers": 2, "switch_steps": 2, "order": "descending"},
    "lisa": {"layers": 2, "switch_steps": 2},
    "hift": {},
    "hift of three": {"group_layers": 3, "order": "random"},
}
SEED = 7


def technique(name, **options):
    return resolve("trained", {name.split()[0]: NAMES.get(name, {}) | options})


def model_of(tied=False):
    torch.manual_seed(0)
    return build(DEEP | {"tie_word_embeddings": tied})


def started(name, states, tied=False):
    model = technique(name).prepare(model_of(tied), SHAPE, SEED)
    groups = groups_of(model)
    for group in groups:
        group["params"] = [each for each in group["params"] if each[1].requires_grad]
    return model, resolve("states", states).optimizer(groups, SHAPE)


def run(name, model, optimizer, steps, accumulated=1):
    for step in steps:
        technique(name).at_step(model, optimizer, step, SEED)
        for _ in range(accumulated):
            (loss_of(model) / accumulated).backward()
        optimizer.step()
        model.zero_grad()


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def kept_bytes(optimizer):
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    )


def blocks_at(name, steps, tied=False):
    return [technique(name).block_at(step, LAYERS, tied, SEED) for step in steps]


def test_a_block_of_badam_has_its_turn_once_a_cycle():
    turns = blocks_at("badam", range(24))
    assert all(turns[step] == turns[step - step % 3] for step in range(24))
    cycles = [turns[:12:3], turns[12::3]]
    for cycle in cycles:
        assert sorted(min(block.layers) for block in cycle) == [0, 1, 2, 3]
        assert not any(block.embedding or block.head for block in cycle)
    assert technique("badam").cycle_steps(SHAPE) == 12
    many = {tuple(blocks_at("badam", range(at, at + 12, 3))) for at in range(0, 1200, 12)}
    assert len(many) > 12  # of 24 orders
    for order, first in (("ascending", {0, 1}), ("descending", {2, 3})):
        block = technique("badam of two", order=order).block_at(0, LAYERS, False, SEED)
        assert block.layers == first


def test_lisa_draws_every_layer_as_often():
    turns = blocks_at("lisa", range(4000))
    assert all(block.embedding and block.head and len(block.layers) == 2 for block in turns)
    assert all(turns[step] == turns[step - step % 2] for step in range(4000))
    counts = Counter(layer for block in turns[::2] for layer in block.layers)
    assert all(abs(count - 1000) < 4 * 500**0.5 for count in counts.values())


def test_a_group_of_hift_has_its_turn_once_a_cycle_at_one_rate():
    for name, groups in (("hift", 6), ("hift of three", 4)):
        method = technique(name)
        turns = blocks_at(name, range(3 * groups))
        assert turns[:groups] == turns[groups : 2 * groups] == turns[2 * groups :]
        assert sum(len(block.layers) for block in turns[:groups]) == LAYERS
        assert len(set(turns[:groups])) == groups == method.cycle_steps(SHAPE)
        rates = [method.schedule_step(step, SHAPE) for step in range(2 * groups)]
        assert rates == [0] * groups + [groups] * groups
    ends = [block for block in blocks_at("hift", range(5), tied=True) if not block.layers]
    assert [(block.embedding, block.head) for block in ends] == [(True, True)]
    assert technique("badam").schedule_step(17, SHAPE) == 17


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_parts_are_all_of_the_model(tied):
    model = model_of(tied)
    parts = parts_of(model)
    found = [*parts.before, *(each for layer in parts.layers for each in layer), *parts.after]
    assert Counter(map(id, found)) == Counter(map(id, model.parameters()))
    assert parts.tied == tied
    assert parts.before == [model.model.embed_tokens.weight]
    assert parts.after == [model.model.norm.weight, *([] if tied else [model.lm_head.weight])]


@pytest.mark.parametrize("states", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_block_moves_or_is_held(name, states):
    model, optimizer = started(name, states)
    seen = set()
    setting = technique(name).rewrite(MemorySetting(dtype="float32", device_kind="cuda"))
    setting = resolve("states", states).rewrite(setting)
    largest = 0
    for step in range(9):
        before = [weight.detach().clone() for weight in model.parameters()]
        run(name, model, optimizer, [step])
        (block,) = blocks_at(name, [step])
        chosen = {id(weight) for weight in weights_of(model, block)}
        seen |= chosen
        for weight, was in zip(model.parameters(), before, strict=True):
            assert torch.equal(weight, was) == (id(weight) not in chosen)
            assert weight.grad is None
        # HiFT's wait where they are, as there is no device beside the host.
        held = seen if name.startswith("hift") else chosen
        assert {id(weight) for weight, state in optimizer.state.items() if state} == held
        if held is chosen:
            assert kept_bytes(optimizer) == state_bytes(SHAPE, at_turn(setting, block))
        largest = max(largest, kept_bytes(optimizer))
    parked = name.startswith("hift")
    on_host = technique(name).rewrite(MemorySetting(dtype="float32", device_kind="cpu"))
    on_host = resolve("states", states).rewrite(on_host)
    assert largest == state_bytes(SHAPE, on_host if parked else setting)


@pytest.mark.parametrize("states", ["adamw", "adafactor", "lomo"])
def test_all_at_once_is_plain_training_bit_for_bit(states):
    plain, torn = model_of(), model_of()
    optimizer = resolve("states", states).optimizer(groups_of(plain), SHAPE)
    for _ in range(5):
        loss_of(plain).backward()
        optimizer.step()
        plain.zero_grad()
    method = technique("lisa", layers=LAYERS)
    second = resolve("states", states).optimizer(groups_of(torn), SHAPE)
    for step in range(5):
        method.at_step(torn, second, step, SEED)
        loss_of(torn).backward()
        second.step()
        torn.zero_grad()
    assert same(plain, torn)


def test_hift_is_an_optimizer_a_group():
    """Each with its own AdamW, which steps at its turns alone."""
    model, optimizer = started("hift", "adamw")
    run("hift", model, optimizer, range(14))
    naive = model_of()
    turns = blocks_at("hift", range(14))
    decays = {
        id(weight): group["weight_decay"]
        for group in groups_of(naive)
        for _, weight in group["params"]
    }
    optimizers = {
        block: torch.optim.AdamW(
            [
                {"params": [weight], "weight_decay": decays[id(weight)]}
                for weight in weights_of(naive, block)
            ],
            lr=1e-3,
            fused=True,
        )
        for block in turns[:6]
    }
    for block in turns:
        loss_of(naive).backward()
        optimizers[block].step()
        naive.zero_grad()
    assert same(model, naive)


def test_gradients_accumulate_within_a_step():
    one, four = started("badam", "sgd"), started("badam", "sgd")
    run("badam", *one, range(5))
    run("badam", *four, range(5), accumulated=4)
    for a, b in zip(one[0].parameters(), four[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("states", ["adamw", "adafactor", "adalomo"])
@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(name, stop, states):
    """Within a block and between two."""
    model, optimizer = started(name, states)
    run(name, model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    run(name, model, optimizer, range(stop, 9))
    file.seek(0)
    weights, kept = torch.load(file, weights_only=True)
    again, second = started(name, states)
    again.load_state_dict(weights)
    second.load_state_dict(kept)
    run(name, again, second, range(stop, 9))
    assert same(model, again)


@pytest.mark.parametrize("states", ["adamw", "lion", "adafactor", "adamw_8bit"])
def test_parked_states_are_read_to_the_host(states):
    """Weights that lie elsewhere (nowhere, here) do not draw them there."""
    model, optimizer = started("hift", states)
    run("hift", model, optimizer, range(4))
    kept = optimizer.state_dict()
    away = model_of().to("meta")
    other = resolve("states", states).optimizer(groups_of(away), SHAPE)
    load_on_host(other)
    other.load_state_dict(kept)
    assert {id(weight) for weight in other.state} <= set(map(id, away.parameters()))
    read = [state for _, state in sorted(other.state_dict()["state"].items())]
    saved = [state for _, state in sorted(kept["state"].items())]
    assert len(read) == len(saved) > 1
    for one, state in zip(read, saved, strict=True):
        assert one.keys() == state.keys()
        for key, value in state.items():
            if hasattr(value, "numel") and value.numel() > 1:
                assert one[key].device.type == "cpu"
                assert one[key].dtype == value.dtype
                assert torch.equal(one[key], value)


@pytest.mark.parametrize("name", ["badam", "lisa", "hift"])
@pytest.mark.long
def test_it_trains(name):
    model, optimizer = started(name, "adamw")
    before = float(loss_of(model).detach())
    run(name, model, optimizer, range(40))
    assert float(loss_of(model).detach()) < 0.8 * before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device beside the host")
def test_states_wait_on_the_host_and_come_back():
    model = model_of().cuda()
    optimizer = resolve("states", "adamw").optimizer(groups_of(model), SHAPE)
    setting = technique("hift").rewrite(MemorySetting(dtype="float32", device_kind="cuda"))
    inputs = {name: tensor.cuda() for name, tensor in batch(4, 32).items()}
    for step in range(14):
        technique("hift").at_step(model, optimizer, step, SEED)
        model(**inputs).loss.backward()
        optimizer.step()
        model.zero_grad()
        (block,) = blocks_at("hift", [step])
        moments = [v for s in optimizer.state.values() for v in s.values() if v.numel() > 1]
        there = sum(value.nbytes for value in moments if value.is_cuda)
        assert there == state_bytes(SHAPE, at_turn(setting, block))
        for weight in weights_of(model, block):
            assert float(optimizer.state[weight]["step"]) == 1 + step // 6


def test_a_block_is_no_larger_than_the_model():
    for name, options in (
        ("badam", {"block_layers": 5}),
        ("lisa", {"layers": 5}),
        ("hift", {"group_layers": 5}),
    ):
        method = resolve("trained", {name: options})
        with pytest.raises(ValueError, match="5 layers is more than the model's 4\nhint: smaller"):
            method.prepare(model_of(), SHAPE, SEED)
    with pytest.raises(ValueError, match="switch_steps must be at least 1, not 0"):
        technique("badam", switch_steps=0)


def test_it_leaves_weights_in_few_bits_alone():
    for name in ("badam", "lisa", "hift"):
        setting = technique(name).rewrite(MemorySetting())
        for weights in ("nf4", "int8"):
            assert "cannot be trained themselves" in resolve("weights", weights).refuses(setting)
