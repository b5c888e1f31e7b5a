"""Gradient scorers against their papers in twenty lines: one backward an example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.conftest import Tally
from thrifty.core.resolve import resolve
from thrifty.signals.adapters import adapter_weights

FEW = {"max_warmup_rows": 20, "epochs": 2, "rank": 2, "dimensions": 512, "max_target_rows": 5}


def gradient(model, wanted, example):
    """[elements], float64, of the mean loss; zero where no token carries loss."""
    ids = torch.as_tensor(np.asarray(example.input_ids, dtype=np.int64))
    keep = torch.as_tensor(np.asarray(example.loss_mask))[1:]
    if not keep.any():
        return torch.zeros(sum(w.numel() for w in wanted), dtype=torch.float64)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]).double()


@pytest.fixture(scope="module")
def warm(pool, target, models):
    """What ``less`` prepared, and its model with the wanted flags set."""
    scorer = resolve("scorer", {"less": FEW})
    return scorer, scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())


def at_checkpoint(state, number):
    """The adapter's weights, and Adam's moments and step, at a checkpoint."""
    weights = adapter_weights(state.model)
    saved = state.checkpoints[number]
    with torch.no_grad():
        for weight, value in zip(weights, saved.weights, strict=True):
            weight.copy_(value)
            weight.requires_grad_(True)
    return weights, torch.cat(saved.first).double(), torch.cat(saved.second).double(), saved.step


def dense(sketch):
    places, signs = sketch._hashes
    matrix = torch.zeros(sketch.num_dimensions, sketch.num_elements, dtype=torch.float64)
    matrix[places, torch.arange(sketch.num_elements)] = signs.double()
    return matrix


def unit(vector):
    return vector / vector.norm()


def test_less_is_what_the_paper_defines(warm, pool, target):
    scorer, (state, own, directions) = warm
    shard = pool.shard(0)
    found = scorer.score(shard, (state, own, directions), Tally())[:6, 0]
    projection, expected = dense(state.sketch), np.zeros(6)
    for number in range(2):
        weights, m, v, t = at_checkpoint(state, number)
        shown = [
            unit(projection @ gradient(state.model, weights, example))
            for example in target.shard(0).tokens[:5]
        ]
        for i, example in enumerate(shard.tokens[:6]):
            g = gradient(state.model, weights, example)
            mean = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1))
            spread = (0.999 * v + 0.001 * g**2) / (1 - 0.999 ** (t + 1))
            step = unit(projection @ (mean / (spread.sqrt() + 1e-8)))
            expected[i] += float(torch.stack([step @ towards for towards in shown]).mean()) / 2
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)


def test_a_checkpoint_is_adams_state_after_an_epoch(warm, pool):
    _, (state, _, _) = warm
    one, two = state.checkpoints
    assert two.step == 2 * one.step
    assert any(not a.equal(b) for a, b in zip(one.weights, two.weights, strict=True))
    assert all((v >= 0).all() for v in two.second)


def test_tracin_is_an_inner_product(pool, target, models):
    scorer = resolve("scorer", {"tracin": FEW})
    state, own, directions = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard = pool.shard(1)
    found = scorer.score(shard, (state, own, directions), Tally())[:6, 0]
    projection, expected = dense(state.sketch), np.zeros(6)
    for number in range(2):
        weights, *_ = at_checkpoint(state, number)
        towards = torch.stack(
            [gradient(state.model, weights, each) for each in target.shard(0).tokens[:5]]
        ).mean(0)
        for i, example in enumerate(shard.tokens[:6]):
            g = gradient(state.model, weights, example)
            expected[i] += float((projection @ g) @ (projection @ towards)) / 2
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 1])
def test_grand_is_the_norm_of_the_gradient(layers, pool, models):
    scorer = resolve("scorer", {"grand": {"layers": layers}})
    shard, model = pool.shard(0), models.base()
    found = scorer.score(shard, scorer.prepare(pool, {}, models, Tally()), Tally())[:6, 0]
    wanted = list(model.parameters() if not layers else model.model.layers[-1].parameters())
    expected = [float(gradient(model, wanted, each).norm()) for each in shard.tokens[:6]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_grad_cosine_is_a_cosine_with_the_mean_of_unit_gradients(pool, target, models):
    scorer = resolve("scorer", {"grad_cosine": {"max_target_rows": 5}})
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard, model = pool.shard(0), models.base()
    found = scorer.score(shard, state, Tally())[:6, 0]
    wanted = list(model.model.layers[-1].parameters())
    towards = unit(sum(unit(gradient(model, wanted, each)) for each in target.shard(0).tokens[:5]))
    expected = [float(unit(gradient(model, wanted, each)) @ towards) for each in shard.tokens[:6]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_row_without_loss_scores_zero_and_not_nan(warm, pool):
    from types import SimpleNamespace

    scorer, state = warm
    shard = pool.shard(0)
    first = shard.tokens[0]
    silent = SimpleNamespace(
        input_ids=first.input_ids, loss_mask=np.zeros(len(first.input_ids), dtype=bool)
    )

    class Shard:
        tokens = (silent, *shard.tokens[1:3])
        num_tokens = shard.num_tokens[:3]

        def __len__(self) -> int:
            return 3

    found = scorer.score(Shard(), state, Tally())
    assert found[0, 0] == 0
    assert np.isfinite(found).all()
    assert (found[1:] != 0).all()
