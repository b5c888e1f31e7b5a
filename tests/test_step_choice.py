"""A step on some rows of a batch: the gradient is theirs, formed from the pass over all.

In float64, but for the norms, which work in float32 whatever they are given.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thrifty.core.contracts import Choice, Chosen
from thrifty.core.resolve import resolve
from thrifty.costs.setting import Adapter, MemorySetting
from thrifty.costs.shape import read_shape
from thrifty.data.packing import PackedDataset
from thrifty.rounds import Rounds
from thrifty.signals.adapters import with_adapter
from thrifty.signals.gradients import trained_elements, trained_matrices
from thrifty.signals.models import load_model
from thrifty.step_choice import StepChoice

SIZES = (11, 17, 9, 20, 14, 6)


@pytest.fixture
def chosen() -> Chosen:
    random = np.random.default_rng(0)
    made = []
    for size in SIZES:
        ids = random.integers(2, 300, size).astype(np.int32)
        made.append(SimpleNamespace(input_ids=ids, loss_mask=random.random(size) < 0.8))
    made[3].loss_mask[:] = False  # nothing to learn from
    return Chosen(
        tokens=made, num_tokens=np.array(SIZES), scores=np.zeros(len(SIZES), dtype=np.float32)
    )


def trained(kind, folder):
    model = load_model(folder, "float32", "cpu").double()
    if kind == "lora":
        model = with_adapter(model, ("q_proj", "v_proj", "down_proj"), 3, 6.0, 0).double()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02)
    return model


class Picks:
    """Chooses the rows at ``places``, whatever they do."""

    chooses, renewals, watches, weighs_tokens, larger = True, 0, False, False, 1

    def __init__(self, places, larger=1):
        self.places, self.seen, self.larger = places, None, larger

    def choose(self, batch, chosen, known, random):
        self.seen = batch
        return Choice(places=np.array(self.places))


def batch_of(chosen):
    """Two packs of three documents."""
    data = PackedDataset(
        chosen.tokens,
        40,
        num_items=2,
        order=lambda _: np.arange(len(chosen)),
        exact=True,
        tells_rows=True,
    )
    items = [data[i] for i in range(2)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def alone(model, chosen, row):
    """Summed loss of a row by itself, and its gradients."""
    example = chosen.tokens[row]
    ids = torch.as_tensor(example.input_ids.astype(np.int64))
    keep = torch.as_tensor(example.loss_mask)[1:]
    logits = model(input_ids=ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep], reduction="sum")
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    filled = (torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True))
    return loss.item(), int(keep.sum()), list(filled)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [3, 1]], ids=["all", "some"])
def test_the_gradient_is_that_of_the_chosen_rows(kind, places, tiny_model, chosen):
    model = trained(kind, tiny_model)
    batch = batch_of(chosen)
    found_in = batch["rows"][(batch["position_ids"] == 0) & (batch["rows"] >= 0)]
    packed = [row for row in found_in.tolist() if row != 3]  # five that can be learnt from
    each = [alone(model, chosen, packed[place]) for place in places]
    every = sum(alone(model, chosen, row)[1] for row in packed)
    tokens = sum(count for _, count, _ in each)
    rounds = Rounds(Picks(places), chosen, {}, num_tokens=1e3, seed=0)
    loss = StepChoice(model, rounds).step(batch, 50)
    scale = every / tokens / 50
    assert float(loss) == pytest.approx(sum(one for one, _, _ in each) * scale, rel=1e-5)
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    for place, weight in enumerate(wanted):
        expected = sum(gradients[place] for _, _, gradients in each) * scale
        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)
    again = [weight.grad.clone() for weight in wanted if weight.grad is not None]
    StepChoice(model, rounds).step(batch, 50)  # the next of the same optimizer step
    twice = [weight.grad for weight in wanted if weight.grad is not None]
    for one, two in zip(again, twice, strict=True):
        torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("layers", [0, 1])
def test_products_are_those_of_the_rows_gradients(kind, layers, tiny_model, chosen, monkeypatch):
    model = trained(kind, tiny_model)
    picks = Picks([0])
    monkeypatch.setattr("thrifty.signals.gradient_mix.LARGEST_PRODUCT", 700)  # some rows at a time
    StepChoice(model, Rounds(picks, chosen, {}, num_tokens=1e3, seed=0)).step(batch_of(chosen), 50)
    wanted = trained_matrices(model, layers)
    size = sum(weight.numel() for weight in wanted)
    adapter = Adapter(rank=3, targets=("q_proj", "v_proj", "down_proj"))
    shape = read_shape(tiny_model)
    assert size == trained_elements(shape, adapter if kind == "lora" else None, layers)
    direction = np.random.default_rng(1).normal(size=size)
    towards, between = picks.seen.products(layers, direction)
    places = [i for i, w in enumerate(p for p in model.parameters() if p.requires_grad)
              if any(w is each for each in wanted)]  # fmt: skip
    rows = []
    for row in (0, 1, 2, 4, 5):
        _, count, gradients = alone(model, chosen, row)
        rows.append(torch.cat([gradients[place].flatten() for place in places]) / count)
    exact = torch.stack(rows).numpy()
    np.testing.assert_allclose(towards, exact @ direction, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(between, exact @ exact.T, rtol=1e-5, atol=1e-7)
    assert picks.seen.num_tokens.tolist() == [
        int(chosen.tokens[row].loss_mask[1:].sum()) for row in (0, 1, 2, 4, 5)
    ]


def choose(method, drawn, target):
    found = method.choose(drawn, None, {"target": target}, np.random.default_rng(0))
    return found.places.tolist()


def test_greats_is_the_papers_greedy():
    random = np.random.default_rng(2)
    gradients, target = random.normal(size=(12, 30)), random.normal(size=30)
    tokens = np.full(12, 10)
    drawn = SimpleNamespace(
        num_tokens=tokens,
        products=lambda layers, direction: (gradients @ direction, gradients @ gradients.T),
    )
    method = resolve("online", {"greats": {"keep": 0.5, "redundancy": 2.0}})
    found = choose(method, drawn, target)
    eta, chosen = 2.0 / 6, []
    for _ in range(6):
        together = sum((gradients[i] for i in chosen), np.zeros(30))
        worth = {
            i: gradients[i] @ target - eta * gradients[i] @ together
            for i in range(12)
            if i not in chosen
        }
        chosen.append(max(worth, key=worth.get))
    assert found == chosen
    plain = resolve("online", {"greats": {"keep": 0.25, "redundancy": 0.0}})
    assert choose(plain, drawn, target) == np.argsort(-(gradients @ target))[:3].tolist()


def test_one_row_is_chosen_however_long():
    drawn = SimpleNamespace(
        num_tokens=np.array([100]), products=lambda *_: (np.array([-1.0]), np.eye(1))
    )
    assert choose(resolve("online", "greats"), drawn, np.zeros(1)) == [0]


def test_what_it_cannot_do_is_refused_before(tiny_model):
    greats, shape = resolve("online", "greats"), read_shape(tiny_model)
    assert "checkpointing" in greats.refuses(shape, MemorySetting(recompute=1))
    assert greats.refuses(shape, MemorySetting()) is None


def test_hooks_and_flags_are_gone_after_a_step(tiny_model, chosen):
    model = trained("lora", tiny_model).train()
    flags = [weight.requires_grad for weight in model.parameters()]
    StepChoice(model, Rounds(Picks([0]), chosen, {}, num_tokens=1e3, seed=0)).step(
        batch_of(chosen), None
    )
    assert model.training
    assert flags == [weight.requires_grad for weight in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
