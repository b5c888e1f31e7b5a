"""DSIR, embedding and quality scorers against naive versions of their formulas."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
import torch

from tests.methods.conftest import Tally
from thrifty.core.resolve import resolve
from thrifty.signals.embeddings import row_vectors
from thrifty.signals.ngrams import _mixed, hashed_ngrams

BUCKETS = 512


def counted(text):
    """Bucket -> count, one n-gram at a time."""
    words = [np.uint64(crc32(w.encode())) for w in re.findall(r"\w+|[^\w\s]", text.lower())]
    found = Counter(int(w) % BUCKETS for w in words)
    for one, two in pairwise(words):
        found[int(_mixed(np.array([one]), np.array([two]))[0]) % BUCKETS] += 1
    return found


def test_ngrams_are_counted():
    texts = ["Sum two, two!", "", "word", "two words and two more words"]
    counts = hashed_ngrams(texts, BUCKETS).toarray()
    for row, text in zip(counts, texts, strict=True):
        assert {b: row[b] for b in np.flatnonzero(row)} == counted(text)
    assert counts[0].sum() == 5 + 4
    one, other = hashed_ngrams(["a b", "b a"], 2**20).toarray()
    assert (one != other).any(), "the order of a pair counts"
    assert hashed_ngrams([], BUCKETS).shape == (0, BUCKETS)


def test_dsir_is_its_formula(pool, target, models):
    rows = {"sums": target.shard(0)}
    scorer = resolve("scorer", {"dsir": {"buckets": BUCKETS}})
    state = scorer.prepare(pool, rows, models, Tally())
    raw, wanted = Counter(range(BUCKETS)), Counter(range(BUCKETS))
    for shard in pool.shards():
        for text in shard.texts:
            raw += counted(text)
    for text in rows["sums"].texts:
        wanted += counted(text)
    shard = pool.shard(0)
    got = scorer.score(shard, state, Tally())[:, 0]
    per_word = resolve("scorer", {"dsir": {"buckets": BUCKETS, "by": "word"}})
    means = per_word.score(shard, state, Tally())[:, 0]
    for text, weight, mean in list(zip(shard.texts, got, means, strict=True))[:10]:
        expected = sum(
            n * np.log(wanted[b] / wanted.total() * raw.total() / raw[b])
            for b, n in counted(text).items()
        )
        assert weight == pytest.approx(expected, rel=1e-5)
        assert mean == pytest.approx(expected / counted(text).total(), rel=1e-5)


def naive_vector(model, example):
    with torch.no_grad():
        ids = torch.tensor(np.asarray(example.input_ids, dtype=np.int64))[None]
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
    weights = torch.arange(1, len(hidden) + 1).double()
    mean = (weights[:, None] * hidden).sum(0) / weights.sum()
    return (mean / mean.norm()).numpy()


def test_vectors_are_weighted_means_whatever_the_batch(pool, models):
    tokens = pool.shard(0).tokens[:20]
    got = row_vectors(models.base(), models.shape, tokens, Tally())
    for vector, example in zip(got, tokens, strict=True):
        np.testing.assert_allclose(vector, naive_vector(models.base(), example), atol=1e-5)


@pytest.mark.parametrize("by", ["max", "mean"])
def test_embedding_is_the_cosine_with_the_target(by, pool, target, models):
    scorer = resolve("scorer", {"embedding": {"by": by, "max_target_rows": 5}})
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard = pool.take(pool.shard(0).ids[:6])
    got = scorer.score(shard, state, Tally())[:, 0]
    asked = np.stack([naive_vector(models.base(), e) for e in target.shard(0).tokens[:5]])
    for value, example in zip(got, shard.tokens, strict=True):
        near = asked @ naive_vector(models.base(), example)
        assert value == pytest.approx(near.max() if by == "max" else near.mean(), abs=1e-5)


def test_quality_is_a_minimum_and_knows_good_from_bad(pool, target, models, tmp_path):
    files = {}
    for name, words in (("good", "crisp clear proof"), ("bad", "buy cheap click")):
        files[name] = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"{words} {k} {words.split()[k % 3]}"} for k in range(40)]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {name: [str(file)] for name, file in files.items()}
    scorer = resolve("scorer", {"quality": {**options, "buckets": BUCKETS}})
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())

    class Texts:
        texts = ("a clear proof", "click to buy")

    good, bad = scorer.score(Texts, state, Tally())[:, 0]
    assert good > 0.5 > -0.5 > bad

    # The gradient of the objective, written out row by row, is zero at the answer.
    lines = [line for name in files for line in files[name].read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    w, b, gradient = state[:-1, 0], state[-1, 0], 1e-4 * state[:-1, 0]
    for place, text in enumerate(texts):
        f = hashed_ngrams([text], BUCKETS).toarray()[0]
        f, y = f / np.linalg.norm(f), 1.0 if place < 40 else -1.0
        gradient = gradient - 0.5 / 40 * y * f / (1 + np.exp(y * (f @ w + b)))
    assert np.abs(gradient).max() < 1e-5


def test_quality_by_default_prefers_rows_like_the_target(pool, target, models):
    scorer = resolve("scorer", "quality")
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard = pool.shard(0)
    scores = scorer.score(shard, state, Tally())[:, 0]
    like = np.array([any(w in t for w in (" two", " plus", " sum")) for t in shard.texts])
    assert scores[like].mean() > scores[~like].mean() + 1
