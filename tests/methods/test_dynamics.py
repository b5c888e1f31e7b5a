"""Scorers of forward passes and of short training runs against naive versions of their formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.methods.conftest import Tally
from thrifty.core.resolve import resolve
from thrifty.signals.clusters import k_means
from thrifty.signals.trajectories import STATISTICS, Trajectories, record

ROWS = 10


def scores(name, pool, models, targets=None, **options):
    scorer = resolve("scorer", {name: options})
    state = scorer.prepare(pool, targets or {}, models, Tally())
    return scorer.score(pool.take(pool.shard(0).ids[:ROWS]), state, Tally())[:, 0]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(ids, dtype=np.int64))[None]).logits[0]


def answer(model, example):
    """Logits [t, vocab] in float64 and ids [t] of the tokens that carry loss."""
    ids, keep = np.asarray(example.input_ids), np.asarray(example.loss_mask)
    places = np.flatnonzero(keep[1:])
    return logits_of(model, ids)[places].double(), torch.tensor(ids[1:][places].astype(np.int64))


def mean_loss(model, example):
    logits, ids = answer(model, example)
    return float(-torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids].mean())


def test_loss_of_a_token_and_of_an_example(pool, models):
    examples = pool.shard(0).tokens[:ROWS]
    each = np.array([mean_loss(models.base(), e) for e in examples])
    np.testing.assert_allclose(scores("loss", pool, models), each, rtol=1e-5)
    whole = each * [e.loss_mask[1:].sum() for e in examples]
    got = scores("loss", pool, models, by="example", keep="low")
    np.testing.assert_allclose(got, -whole, rtol=1e-5)


def test_el2n_is_the_norm_of_the_error_vector(pool, models):
    expected = []
    for example in pool.shard(0).tokens[:ROWS]:
        logits, ids = answer(models.base(), example)
        error = torch.softmax(logits, -1)
        error[torch.arange(len(ids)), ids] -= 1
        expected.append(float(error.norm(dim=-1).mean()))
    np.testing.assert_allclose(scores("el2n", pool, models), expected, rtol=1e-5)


def test_memorization_is_the_share_of_greedy_tokens(pool, models):
    expected = []
    for example in pool.shard(0).tokens[:ROWS]:
        logits, ids = answer(models.base(), example)
        expected.append(float((logits.argmax(-1) == ids).double().mean()))
    np.testing.assert_allclose(scores("memorization", pool, models), -np.array(expected), rtol=1e-6)


def test_ifd_is_the_ratio_of_perplexities(pool, models):
    model, expected = models.base(), []
    for example in pool.shard(0).tokens[:ROWS]:
        alone = np.asarray(example.input_ids)[np.asarray(example.loss_mask)].astype(np.int64)
        logits = logits_of(model, [model.config.bos_token_id, *alone])[:-1].double()
        log_p = torch.log_softmax(logits, -1)[torch.arange(len(alone)), torch.tensor(alone)]
        ratio = np.exp(mean_loss(model, example)) / np.exp(-float(log_p.mean()))
        expected.append(ratio if ratio < 1 else -ratio)
    np.testing.assert_allclose(scores("ifd", pool, models), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        scores("superfiltering", pool, models), scores("ifd", pool, models)
    )


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """Half as wide, with the same tokenizer; and one whose tokenizer has fewer merges."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other") / "model"
    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 16, 32, 2
    config.head_dim = 8
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_another_model_is_the_one_that_scores(pool, models, other_model):
    got = scores("loss", pool, models, model=str(other_model))
    other = models.other(str(other_model))
    assert other.shape.num_parameters < models.shape.num_parameters
    expected = [mean_loss(other.base(), e) for e in pool.shard(0).tokens[:ROWS]]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_another_tokenizer_splits_the_rows_anew(pool, models, other_model, tmp_path):
    import shutil

    from tokenizers import Tokenizer

    folder = shutil.copytree(other_model, tmp_path / "bytes")
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    model = type(tokenizer.model)(vocab=tokenizer.get_vocab(), merges=[])
    tokenizer.model = model
    tokenizer.save(str(file))
    other = models.other(str(folder))
    shard = pool.shard(0)
    split = other.tokens(shard)
    assert len(split) == len(shard)
    assert sum(len(t.input_ids) for t in split) > shard.num_tokens.sum()
    got = scores("loss", pool, models, model=str(folder))
    expected = [mean_loss(other.base(), e) for e in split[:ROWS]]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_reference_that_splits_rows_otherwise_is_refused(pool, models, target, letters):
    with pytest.raises(ValueError, match=r"splits rows otherwise.*\nhint: rho"):
        scores("rho", pool, models, {"sums": target.shard(0)}, reference=str(letters))


def test_one_reference_passes_once_for_all_targets(pool, models, other_model, target):
    scorer = resolve("scorer", {"rho": {"reference": str(other_model)}})
    ticked = []
    for count in (1, 3):
        rows = {f"t{i}": target.shard(0) for i in range(count)}
        tally = Tally()
        state = scorer.prepare(pool, rows, models, tally)
        found = scorer.score(pool.shard(0), state, tally)
        assert found.shape == (len(pool.shard(0)), count)
        ticked.append(tally.cost.flops)
    assert ticked[0] == ticked[1] > 0


def test_rho_is_the_difference_to_the_reference(pool, models, other_model, target):
    rows = {"sums": target.shard(0)}
    got = scores("rho", pool, models, rows, reference=str(other_model))
    reference = models.other(str(other_model)).base()
    expected = [
        mean_loss(models.base(), e) - mean_loss(reference, e) for e in pool.shard(0).tokens[:ROWS]
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_reference_trained_on_the_target_prefers_its_like(pool, models, target):
    scorer = resolve("scorer", {"rho": {"learning_rate": 3e-3, "epochs": 10}})
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    like, other = [], []
    for shard in pool.shards():
        for text, score in zip(shard.texts, scorer.score(shard, state, Tally())[:, 0], strict=True):
            (like if any(w in text for w in (" two", " plus", " sum")) else other).append(score)
    assert np.mean(like) > np.mean(other) + 0.1


# -- trajectories -------------------------------------------------------------------------------


def test_what_is_recorded_is_of_the_weights_before_each_step(pool, models):
    """Against a loop that looks again, in passes of its own."""
    found = record(pool, models, Tally(), epochs=2, learning_rate=1e-3, max_rows=8, seed=3)
    assert found.values.shape == (8, 2, len(STATISTICS))
    tokens = {int(i): t for s in pool.shards() for i, t in zip(s.ids, s.tokens, strict=True)}
    # All eight rows are one or more batches; in the first epoch a batch's first step sees the base.
    model, first = models.base(), found.of("loss")[:, 0]
    near = [abs(mean_loss(model, tokens[i]) - first[k]) for k, i in enumerate(found.ids.tolist())]
    assert min(near) < 2e-3
    for k, row in enumerate(found.ids.tolist()):
        if near[k] == min(near):
            logits, ids = answer(model, tokens[row])
            at = torch.arange(len(ids))
            p = torch.softmax(logits, -1)[at, ids].mean()
            others = logits.clone()
            others[at, ids] = -torch.inf
            margin = (logits[at, ids] - others.max(-1).values).mean()
            accuracy = (logits.argmax(-1) == ids).double().mean()
            got = found.values[k, 0].astype(float)
            np.testing.assert_allclose(got[1:], [p, margin, accuracy], rtol=2e-3, atol=1e-3)


def test_a_proxy_run_trains_a_copy(pool, models):
    before = copy.deepcopy(models.base().state_dict())
    found = record(pool, models, Tally(), epochs=4, learning_rate=3e-3, max_rows=60, seed=0)
    losses = found.of("loss").mean(0)
    assert losses[-1] < losses[0] - 0.5
    assert all(value.equal(before[name]) for name, value in models.base().state_dict().items())


def recorded(**columns):
    values = np.zeros((len(next(iter(columns.values()))), 3, len(STATISTICS)), dtype=np.float16)
    for name, rows in columns.items():
        values[:, :, STATISTICS.index(name)] = rows
    return Trajectories(np.arange(len(values)), values)


def test_forgetting_counts_flips():
    found = recorded(accuracy=[[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0.5]])
    assert resolve("scorer", "forgetting").row_scores(found).tolist() == [1, 0, 3, 0.5]


def test_cartography_and_aum():
    steady, unsure, low = [0.9, 0.9, 0.9], [0.1, 0.5, 0.9], [0.1, 0.1, 0.1]
    found = recorded(probability=[steady, unsure, low], margin=[[2, 2, 2], [0, 1, 2], [-3, -3, -3]])
    order = {
        keep: np.argsort(-resolve("scorer", {"cartography": {"keep": keep}}).row_scores(found))[0]
        for keep in ("ambiguous", "easy", "hard")
    }
    assert order == {"ambiguous": 1, "easy": 0, "hard": 2}
    assert resolve("scorer", "aum").row_scores(found).tolist() == [2, 1, -3]


def test_s2l_draws_evenly_from_the_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[5.0, 4.0, 3.0]] * 60 + [[1.0, 1.0, 1.0]] * 10 + [[9.0, 2.0, 8.0]] * 2)
    found = recorded(loss=centres + rng.normal(0, 0.01, centres.shape))
    scorer = resolve("scorer", {"s2l": {"clusters": 3}})
    best = np.argsort(-scorer.row_scores(found), kind="stable")[:14]
    groups = [(best < 60).sum(), ((best >= 60) & (best < 70)).sum(), (best >= 70).sum()]
    assert groups == [6, 6, 2]


def test_k_means_finds_clusters_and_repeats():
    rng = np.random.default_rng(1)
    means = rng.normal(0, 10, (5, 4))
    own = rng.integers(0, 5, 3000)
    vectors = means[own] + rng.normal(0, 0.1, (3000, 4))
    found = k_means(vectors, 5, 0)
    np.testing.assert_array_equal(found, k_means(vectors, 5, 0))
    for cluster in range(5):
        assert len(set(found[own == cluster].tolist())) == 1
    assert k_means(vectors[:3], 100, 0).max() <= 2
