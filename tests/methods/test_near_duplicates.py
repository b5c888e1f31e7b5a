"""Near duplicates against all pairs and datasketch, semantic ones and k-means against faiss."""

from __future__ import annotations

import random

import faiss
import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from tests.methods.test_pickers import Vectors
from thrifty.core.contracts import Candidates, Held
from thrifty.core.resolve import resolve
from thrifty.signals.clusters import connected, k_means
from thrifty.signals.minhash import banding, near_pairs, shingles

WORDS = [f"w{k}" for k in range(400)]


@pytest.fixture(scope="module")
def texts():
    """200 random texts of 60 words, and 100 of them again with some words replaced."""
    rng = random.Random(0)
    found = [" ".join(rng.choices(WORDS, k=60)) for _ in range(200)]
    for place in range(100):
        words = found[place].split()
        for at in rng.sample(range(60), place % 4):
            words[at] = rng.choice(WORDS)
        found.append(" ".join(words).upper())
    return found


def jaccard(one, two):
    return len(one & two) / len(one | two)


def test_pairs_are_those_that_are_near(texts):
    sets = [shingles(text, 3) for text in texts]
    pairs = {tuple(p) for p in near_pairs(iter([texts[:170], texts[170:]]), 300, 0.8, 3).tolist()}
    likeness = {(i, j): jaccard(sets[i], sets[j]) for i in range(300) for j in range(i + 1, 300)}
    surely = {pair for pair, value in likeness.items() if value > 0.9}
    never = {pair for pair, value in likeness.items() if value < 0.65}
    assert len(surely) >= 25
    assert len(surely - pairs) <= 1
    assert not pairs & never


def test_datasketch_finds_the_same_groups(texts):
    """But for pairs within what 128 hashes cannot tell."""
    index = MinHashLSH(threshold=0.8, num_perm=128, params=banding(0.8))
    hashes, theirs = [], []
    for place, text in enumerate(texts):
        found = MinHash(num_perm=128)
        found.update_batch([s.encode() for s in shingles(text, 3)])
        for other in index.query(found):
            if found.jaccard(hashes[other]) >= 0.8:
                theirs.append((other, place))
        index.insert(place, found)
        hashes.append(found)
    ours = {tuple(p) for p in near_pairs(iter([texts]), 300, 0.8, 3).tolist()}
    different = ours ^ set(theirs)
    sets = [shingles(text, 3) for text in texts]
    assert all(0.65 < jaccard(sets[i], sets[j]) < 0.95 for i, j in different)
    assert len(ours & set(theirs)) >= 0.8 * len(ours)


def test_banding_finds_a_pair_at_the_threshold_nine_times_in_ten():
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        bands, rows = banding(threshold)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.9


def test_connected_places_share_a_group():
    groups = connected(np.array([[0, 1], [1, 4], [2, 3]]), 6)
    assert groups[0] == groups[1] == groups[4] != groups[2] == groups[3] != groups[5]


class Texts(Vectors):
    def __init__(self, texts, vectors):
        super().__init__(vectors)
        self._texts = texts

    def texts(self):
        half = len(self._texts) // 2
        yield np.arange(half), self._texts[:half]
        yield np.arange(half, len(self._texts)), self._texts[half:]


def candidates(texts, scores, vectors=None):
    count = len(texts)
    return Candidates(
        ids=np.arange(count),
        scores=np.asarray(scores, dtype=np.float32)[:, None],
        num_tokens=np.ones(count, dtype=np.int64),
        fingerprints=np.zeros(count, dtype="V16"),
        targets=("t",),
        weights=(1.0,),
        look=Texts(texts, np.ones((count, 2)) if vectors is None else np.asarray(vectors)),
    )


def test_of_near_duplicates_the_best_scored_survives():
    long = " ".join(WORDS[:80])
    rows = candidates([long, "something else entirely", long + " more", "", ""], [1, 2, 3, 0, 0])
    dropped = resolve("filter", "near_duplicates").drop(rows, Held({}))
    assert dropped == {0: "near duplicate of row 2", 4: "near duplicate of row 3"}
    mixed = rows.where(np.array([4, 2, 0, 3, 1]))
    assert resolve("filter", "near_duplicates").drop(mixed, Held({})) == dropped


def test_of_semantic_duplicates_the_best_scored_survives():
    vectors = [[1, 0], [0.999, 0.01], [0, 1], [0.7, 0.7], [0.01, 0.999]]
    rows = candidates(["a"] * 5, [1, 2, 3, 4, 5], vectors)
    dropped = resolve("filter", {"semantic_duplicates": {"clusters": 1}}).drop(rows, Held({}))
    assert dropped == {0: "semantic duplicate of row 1", 2: "semantic duplicate of row 4"}


@pytest.fixture(scope="module")
def vectors():
    """3,000 unit vectors around 40 centres, some of them almost the same."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(40, 32))
    found = centres[random.integers(40, size=3000)] + 0.3 * random.normal(size=(3000, 32))
    found[1000:1200] = found[:200] + 0.02 * random.normal(size=(200, 32))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_faiss_finds_the_same_semantic_duplicates(vectors):
    """Of one cluster: all pairs by ``range_search``, and of each group the best-scored is left."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    limits, _, places = index.range_search(vectors, 0.98)
    pairs = np.stack(
        [np.repeat(np.arange(len(vectors)), np.diff(limits.astype(np.int64))), places], axis=1
    )
    group = connected(pairs.astype(np.int64), len(vectors))
    scores = np.random.default_rng(1).permutation(len(vectors)).astype(np.float32)
    best = {each: np.flatnonzero(group == each)[scores[group == each].argmax()] for each in group}
    rows = candidates(["a"] * len(vectors), scores, vectors)
    spec = {"semantic_duplicates": {"clusters": 1, "epsilon": 0.02}}
    dropped = resolve("filter", spec).drop(rows, Held({}))
    assert 100 < len(dropped) < 400
    assert set(range(len(vectors))) - set(dropped) == {int(row) for row in best.values()}


@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_k_means_is_no_worse_than_that_of_faiss(vectors, count, dtype):
    """By the squared distances to the means, of which k-means++ begins nearer to the least."""

    def spread(own):
        groups = [vectors[own == each] for each in range(count)]
        return sum(float(((group - group.mean(0)) ** 2).sum()) for group in groups if len(group))

    theirs = faiss.Kmeans(vectors.shape[1], count, niter=20, seed=1)
    theirs.train(vectors)
    _, own = theirs.index.search(vectors, 1)
    assert spread(k_means(vectors.astype(dtype), count, 0)) < 1.02 * spread(own[:, 0])


def test_k_means_of_equal_vectors_is_one_cluster():
    same = np.full((300, 8), 0.1, dtype=np.float32)
    assert k_means(same, 5, 0).max() == 0
    same[7] += 1.0
    assert sorted(np.bincount(k_means(same, 5, 0))) == [1, 299]
