"""Online coresets against their papers' definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.methods.conftest import Tally
from tests.methods.test_gradients import gradient
from thrifty.core.contracts import Chosen
from thrifty.core.resolve import resolve
from thrifty.signals.gradients import trained_matrices
from thrifty.signals.models import ModelInTraining, load_model


@pytest.fixture(scope="module")
def rows(pool) -> Chosen:
    tokens = list(pool.shard(0).tokens[:20])
    lengths = np.array([len(row.input_ids) for row in tokens])
    return Chosen(tokens=tokens, num_tokens=lengths, scores=np.zeros(20, dtype=np.float32))


def test_craig_stands_for_all_rows_as_well_as_greedy_can():
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 8)) * 5
    gradients = np.repeat(centres, (7, 4, 2), axis=0) + random.normal(size=(13, 8)) * 0.1
    method = resolve("online", "craig")
    kept, weights = method.coreset(gradients, np.ones(13), 3)
    assert sorted(np.searchsorted([7, 11], kept, side="right").tolist()) == [0, 1, 2]
    by_row = dict(zip(np.searchsorted([7, 11], kept, side="right").tolist(), weights, strict=True))
    assert by_row == {0: 7.0, 1: 4.0, 2: 2.0}
    distances = np.linalg.norm(gradients[:, None] - gradients[None], axis=2)
    likeness = distances.max() - distances

    def stands(some):
        return likeness[:, list(some)].max(1).sum()

    best = max(map(stands, itertools.combinations(range(13), 3)))
    assert stands(kept) >= (1 - 1 / np.e) * best


def test_gradmatch_meets_the_mean_gradient():
    random = np.random.default_rng(1)
    gradients = random.normal(size=(40, 6)) + 1.0
    method = resolve("online", {"gradmatch": {"ridge": 0.0, "max_coreset": 12}})
    kept, weights = method.coreset(gradients, np.ones(40), 40)
    assert len(kept) <= 12
    assert (weights > 0).all()
    error = np.linalg.norm(weights @ gradients[kept] - gradients.mean(0))
    assert error < 1e-6  # six dimensions, more rows than that
    few, some = resolve("online", {"gradmatch": {"max_coreset": 3}}).coreset(
        gradients, np.ones(40), 40
    )
    drawn = [random.choice(40, 3, replace=False) for _ in range(200)]
    at_random = [np.linalg.norm(gradients[each].mean(0) - gradients.mean(0)) for each in drawn]
    assert np.linalg.norm(some @ gradients[few] - gradients.mean(0)) < np.median(at_random)


@pytest.mark.parametrize("name", ["craig", "gradmatch"])
def test_a_look_is_at_the_gradients_of_the_model_as_it_is(name, rows, models):
    model = load_model(models.folder, "float32", "cpu")
    method = resolve("online", {name: {"dimensions": 4096, "keep": 0.4}})
    wanted = trained_matrices(model, 1)
    exact = np.stack([gradient(model, wanted, row).numpy() for row in rows.tokens])
    seen: list = []

    class Watched(type(method)):
        def coreset(self, gradients, tokens, max_tokens):
            seen.append((gradients, tokens, max_tokens))
            return super().coreset(gradients, tokens, max_tokens)

    watched = Watched(dimensions=4096, keep=0.4)
    found = watched.renew(rows, {}, ModelInTraining(model, models.shape), Tally())
    gradients, tokens, most = seen[0]
    norms = np.linalg.norm(exact, axis=1)
    close = gradients @ gradients.T - exact @ exact.T
    assert np.abs(close).max() < 6 / np.sqrt(4096) * norms.max() ** 2
    assert most == pytest.approx(0.4 * rows.num_tokens.sum())
    assert tokens[found["coreset"]].sum() <= most
    assert found["weights"].mean() == pytest.approx(1.0)
    with torch.no_grad():
        for weight in wanted:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    watched.renew(rows, {}, ModelInTraining(model, models.shape), Tally())
    assert not np.allclose(seen[1][0], gradients)


def test_one_row_that_is_too_long_is_trained_on_all_the_same(rows, models):
    one = Chosen(tokens=rows.tokens[:1], num_tokens=rows.num_tokens[:1], scores=rows.scores[:1])
    model = load_model(models.folder, "float32", "cpu")
    for name in ("craig", "gradmatch"):
        known = resolve("online", name).renew(
            one, {}, ModelInTraining(model, models.shape), Tally()
        )
        assert known["coreset"].tolist() == [0]
        assert known["weights"].tolist() == [1.0]
