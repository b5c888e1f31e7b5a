"""A step on a few rows of a larger batch: what tells them apart, and what is trained on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.test_step_choice import Picks, batch_of, chosen  # noqa: F401
from thrifty.core.resolve import resolve
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.data.packing import IGNORED
from thrifty.larger_batch import LargerBatch
from thrifty.rounds import Rounds
from thrifty.signals.adapters import with_adapter
from thrifty.signals.last_layer import last_value_weight
from thrifty.signals.models import load_model


@pytest.mark.parametrize("adapted", [False, True])
def test_slopes_are_the_rows_gradients_along_the_directions(adapted, tiny_model, chosen):  # noqa: F811
    model = load_model(tiny_model, "float32", "cpu")
    if adapted:
        model = with_adapter(model, ("q_proj", "v_proj"), 2, 4.0, 0)
    seen = Picks([0], larger=2)
    rounds = Rounds(seen, chosen, {}, num_tokens=1e3, seed=0)
    batch = batch_of(chosen)
    inner = model.get_base_model() if adapted else model
    LargerBatch(inner, rounds).smaller(batch)
    weight = last_value_weight(inner)
    before = weight.detach().clone()
    directions = np.random.default_rng(0).normal(size=(3, weight.numel())).astype(np.float32)
    slopes = seen.seen.slopes(directions, 1e-3)
    assert seen.seen.num_elements == weight.numel()
    assert weight.equal(before)
    weight.requires_grad_(True)
    for found, row in zip(slopes, seen.seen.rows.tolist(), strict=True):
        example = chosen.tokens[row]
        ids = torch.as_tensor(example.input_ids.astype(np.int64))
        keep = torch.as_tensor(example.loss_mask)[1:]
        logits = inner(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep])
        (gradient,) = torch.autograd.grad(loss, weight)
        exact = directions @ gradient.flatten().numpy()
        np.testing.assert_allclose(found, exact, atol=2e-3 + 0.03 * np.abs(exact).max())


def test_what_is_kept_is_packed_into_a_batch_of_the_usual_size(tiny_model, chosen):  # noqa: F811
    model = load_model(tiny_model, "float32", "cpu")
    batch = batch_of(chosen)
    rounds = Rounds(Picks([3, 1, 0, 2, 4], larger=2), chosen, {}, num_tokens=1e3, seed=0)
    made, share = LargerBatch(model, rounds).smaller(batch)
    assert made["input_ids"].shape == (1, 40)
    packed = [row for row in made["rows"][made["position_ids"] == 0].tolist() if row >= 0]
    first = [0, 1, 2, 4, 5]  # that carry loss, in their order in the batch
    assert set(packed) <= {first[place] for place in (3, 1, 0)}
    assert first[3] in packed
    assert first[1] in packed
    for row in packed:
        assert (
            made["input_ids"][made["rows"] == row].tolist() == chosen.tokens[row].input_ids.tolist()
        )
    kept, all_of_them = ((each["labels"] != IGNORED).sum() for each in (made, batch))
    assert share == pytest.approx(float(kept / all_of_them))


class Features:
    """Rows along one direction each, in clusters."""

    num_elements = 6

    def __init__(self, gradients):
        self.gradients, self.rows = gradients, np.arange(len(gradients))
        self.num_tokens = np.full(len(gradients), 9)

    def slopes(self, directions, epsilon):
        return self.gradients @ directions.T


def test_colm_keeps_small_groups_and_the_medoids_of_the_others():
    random = np.random.default_rng(3)
    centres = random.normal(size=(3, 6)) * 4
    gradients = np.repeat(centres, (5, 5, 5), axis=0) + random.normal(size=(15, 6)) * 0.01
    gradients = np.vstack([gradients, random.normal(size=(1, 6))])
    known = SimpleNamespace(
        num_tokens=np.full(16, 10), groups=np.array([0] * 15 + [1]), __len__=lambda: 16
    )
    colm = resolve("online", {"colm": {"larger": 4, "probes": 64, "small_share": 0.1}})
    found = colm.choose(Features(gradients), Sized(known), {}, np.random.default_rng(0))
    places = found.places.tolist()
    assert 15 in places
    assert sorted(place // 5 for place in places if place < 15) == [0, 1, 2]
    spread = found.learnt["spread"]
    again = colm.choose(
        Features(2 * gradients), Sized(known), {"spread": spread}, np.random.default_rng(0)
    )
    mean = again.learnt["spread"] - 0.9 * spread
    np.testing.assert_allclose(mean, 0.1 * 4 * spread, rtol=1e-6)  # the first spread was g^2


class Sized:
    """``Chosen``, of which only this much is looked at."""

    def __init__(self, of):
        self.num_tokens, self.groups = of.num_tokens, of.groups

    def __len__(self):
        return len(self.num_tokens)


def test_a_family_without_a_value_projection_of_its_own_is_refused(tiny_model):
    colm = resolve("online", "colm")
    fused = ModelShape.from_config(
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320}
    )
    assert "v_proj" in colm.refuses(fused, MemorySetting())
    assert colm.refuses(read_shape(tiny_model), MemorySetting()) is None
