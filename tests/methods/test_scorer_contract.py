"""What every scorer must fulfil, run over every scorer there is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.methods.conftest import Tally, briefly, usual
from thrifty.asked_rows import stats_together
from thrifty.core.contracts import Scorer, Work, Worth
from thrifty.core.resolve import all_names, method_class, name_of, resolve, summary
from thrifty.costs.hardware import load_device

NAMES = all_names("scorer")


def scores_of(scorer, pool, target, models):
    """id -> row of scores, and what was ticked; the shards scored again backwards give the same."""
    tally = Tally()
    targets = {"sums": target.shard(0)} if scorer.needs_target else {}
    state = scorer.prepare(pool, targets, models, tally)
    found = {}
    for i in range(pool.num_shards):
        shard = pool.shard(i)
        scores = scorer.score(shard, state, tally)
        assert scores.dtype == np.float32
        assert scores.shape == (len(shard), max(len(targets), 1))
        found |= dict(zip(shard.ids.tolist(), scores, strict=True))
    for i in reversed(range(pool.num_shards)):
        shard = pool.shard(i)
        again = scorer.score(shard, state, Tally())
        np.testing.assert_array_equal(again, [found[row] for row in shard.ids.tolist()])
    return found, tally.cost


@pytest.fixture(scope="module")
def scored(pool, target, models):
    """name -> what ``scores_of`` says of it, and the model's weights and flags before."""

    @cache
    def once(name):
        before = {
            n: (p.requires_grad, p.detach().clone()) for n, p in models.base().named_parameters()
        }
        return *scores_of(briefly(name), pool, target, models), before

    return once


def work_of(pool, target, models):
    return Work(
        pool=stats_together([pool.manifest]),
        targets={"sums": stats_together([target.manifest])},
        shape=models.shape,
        device=load_device("h100"),
        max_length=128,
    )


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    cls = method_class("scorer", name)
    assert issubclass(cls, Scorer)
    assert 10 < len(summary(cls)) < 100
    assert isinstance(cls.worth, Worth)
    assert cls.worth.mean > 0
    assert cls.worth.source
    assert cls.source
    assert set(cls.tasks) <= {"sft", "continued", "preference"}
    assert cls() == resolve("scorer", name), "all fields have defaults"
    assert name_of(cls()) == name


@pytest.mark.parametrize("name", usual(NAMES))
@pytest.mark.long
def test_does_not_depend_on_shards_or_their_order(name, scored, whole_pool, target, models):
    shards, _, _ = scored(name)
    once, _ = scores_of(briefly(name), whole_pool, target, models)
    assert shards.keys() == once.keys()
    for row, scores in shards.items():
        np.testing.assert_allclose(scores, once[row], rtol=2e-4, atol=2e-5)


def test_perplexity_bands_do_not_depend_on_the_shards(pool, whole_pool, target, models):
    for band in ("low", "high"):
        scorer = resolve("scorer", {"perplexity": {"band": band}})
        shards, _ = scores_of(scorer, pool, target, models)
        once, _ = scores_of(scorer, whole_pool, target, models)
        for row, scores in shards.items():
            np.testing.assert_allclose(scores, once[row], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", usual(NAMES))
def test_predicted_flops_are_what_it_charges(name, scored, pool, target, models):
    scorer = briefly(name)
    _, charged, _ = scored(name)
    predicted = scorer.cost(work_of(pool, target, models))
    assert predicted.flops == pytest.approx(charged.flops, rel=0.1)
    assert predicted.seconds >= 0
    if scorer.needs_model:
        assert charged.flops > 0
        assert predicted.peak_memory_bytes > models.shape.num_parameters * 4


@pytest.mark.parametrize("name", usual(NAMES))
def test_leaves_the_model_as_it_was(name, scored, models):
    _, _, before = scored(name)
    model = models.base()
    assert not model.training
    for n, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == before[n][0]
        assert p.equal(before[n][1])


def test_targeted_scorers_prefer_rows_like_the_target(pool, target, models):
    topic = {
        i: "sums" if any(w in text for w in (" two", " plus", " sum")) else "other"
        for shard in pool.shards()
        for i, text in zip(shard.ids.tolist(), shard.texts, strict=True)
    }
    scores, _ = scores_of(resolve("scorer", "bm25"), pool, target, models)
    best = sorted(scores, key=lambda i: -scores[i][0])[:30]
    assert sum(topic[i] == "sums" for i in best) >= 28
