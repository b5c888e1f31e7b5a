"""Scorers against twenty-line versions of their formulas."""

from __future__ import annotations

import math
from collections import Counter

import bm25s
import numpy as np
import torch

from tests.methods.conftest import Tally
from thrifty.core.resolve import resolve
from thrifty.scorers.baselines.bm25 import words


def test_bm25_is_its_formula(pool, target, models):
    scorer = resolve("scorer", "bm25")
    rows = target.shard(0)
    state = scorer.prepare(pool, {"sums": rows}, models, Tally())
    texts = {
        i: words(t) for s in pool.shards() for i, t in zip(s.ids.tolist(), s.texts, strict=True)
    }
    mean = np.mean([len(t) for t in texts.values()])
    seen = Counter(w for t in texts.values() for w in set(t))
    count = len(texts)
    for shard in list(pool.shards())[:1]:
        got = scorer.score(shard, state, Tally())[:, 0]
        for i, value in zip(shard.ids.tolist()[:10], got, strict=False):
            text = Counter(texts[i])
            total = 0.0
            for query in rows.texts:
                for w in words(query):
                    idf = math.log(1 + (count - seen[w] + 0.5) / (seen[w] + 0.5))
                    length = 1.5 * (1 - 0.75 + 0.75 * len(texts[i]) / mean)
                    total += idf * text[w] / (text[w] + length)
            assert math.isclose(value, total / len(rows.texts), rel_tol=1e-4)


def test_bm25_is_that_of_bm25s(pool, target, models):
    rows = target.shard(0)
    scorer = resolve("scorer", "bm25")
    state = scorer.prepare(pool, {"sums": rows}, models, Tally())
    got = np.concatenate([scorer.score(shard, state, Tally())[:, 0] for shard in pool.shards()])
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index([words(t) for s in pool.shards() for t in s.texts], show_progress=False)
    expected = np.mean([index.get_scores(words(query)) for query in rows.texts], axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def naive_loss(model, example):
    ids = torch.tensor(np.asarray(example.input_ids, dtype=np.int64))[None]
    logits = model(input_ids=ids).logits[0, :-1].double()
    mask = torch.tensor(np.asarray(example.loss_mask))[1:]
    logp = torch.log_softmax(logits, dim=-1)[torch.arange(len(mask)), ids[0, 1:]]
    return -(logp * mask).sum() / mask.sum()


def test_perplexity_is_the_loss_of_the_answer(pool, models):
    scorer = resolve("scorer", {"perplexity": {"band": "high"}})
    state = scorer.prepare(pool, {}, models, Tally())
    shard = pool.shard(0)
    got = scorer.score(shard, state, Tally())[:, 0]
    with torch.no_grad():
        for value, example in zip(got, shard.tokens[:12], strict=False):
            assert math.isclose(value, float(naive_loss(models.base(), example)), rel_tol=1e-5)


def test_gradient_cosine_is_that_of_one_backward_an_example(pool, target, models):
    scorer = resolve("scorer", {"grad_cosine": {"max_target_rows": 5}})
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard = pool.take(pool.shard(0).ids[:6])
    got = scorer.score(shard, state, Tally())[:, 0]
    model = models.base()
    layer = [p for n, p in model.named_parameters() if n.startswith("model.layers.1.")]

    def gradient(example):
        grads = torch.autograd.grad(naive_loss(model, example), layer)
        return torch.cat([g.double().flatten() for g in grads])

    mean = sum(g / g.norm() for g in map(gradient, target.shard(0).tokens[:5]))
    for value, example in zip(got, shard.tokens, strict=True):
        g = gradient(example)
        assert math.isclose(value, float(g @ mean / g.norm() / mean.norm()), abs_tol=1e-5)
