"""From a question's vector to how likely each model is to answer it rightly.

    ridge s        mean + W x, the weights W drawn to 0 by s questions
    neighbours s   mean over the s nearest questions
    forest s       100 extremely randomised trees of all models at once, leaves of at least s

All fall back to each model's own mean where the vector tells nothing. A fitted one is plain arrays,
and the trees are walked by numpy: nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
Kind = tuple[str, float]

KINDS: tuple[Kind, ...] = (
    *(("ridge", strength) for strength in (30.0, 300.0, 3000.0)),
    *(("neighbours", number) for number in (25, 50, 100)),
    *(("forest", leaf) for leaf in (5, 10, 20)),
)
NUM_TREES = 100
FOLDS = 5
_AT_ONCE = 1024
"""Questions whose distances to all others are held."""


def fit_predictor(kind: Kind, x: Floats, y: Floats, seed: int = 0) -> Arrays:
    """``x``: [questions, width]; ``y``: [questions, models], from 0 to 1."""
    name, setting = kind
    if name == "ridge":
        mean = y.mean(axis=0)
        center = x.mean(axis=0)
        moved = x - center
        square = moved.T @ moved + setting * np.eye(x.shape[1])
        weights = np.linalg.solve(square, moved.T @ (y - mean))
        return {"weights": weights, "offset": mean - center @ weights}
    if name == "neighbours":
        return {"near": x.astype(np.float32), "near_right": y, "number": np.array(int(setting))}
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(
        NUM_TREES, min_samples_leaf=int(setting), max_features=1 / 3, random_state=seed
    ).fit(x, y)
    return _flattened([tree.tree_ for tree in forest.estimators_])


def predict(name: str, fitted: Mapping[str, NDArray[Any]], x: Floats) -> Floats:
    """[questions, models]."""
    if name == "ridge":
        return np.asarray(x @ fitted["weights"] + fitted["offset"])
    if name == "neighbours":
        return _of_neighbours(fitted, x)
    return _of_trees(fitted, x.astype(np.float32))


def out_of_fold(kind: Kind, x: Floats, y: Floats, seed: int = 0) -> Floats:
    """[questions, models], each predicted by what was fitted without its fold."""
    fold_of = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    found = np.empty_like(y)
    for fold in range(FOLDS):
        out = fold_of == fold
        fitted = fit_predictor(kind, x[~out], y[~out], seed)
        found[out] = predict(kind[0], fitted, x[out])
    return found


def _of_neighbours(fitted: Mapping[str, NDArray[Any]], x: Floats) -> Floats:
    near, right = fitted["near"].astype(float), fitted["near_right"]
    number = min(int(fitted["number"]), len(near))
    lengths = (near**2).sum(axis=1)
    found = np.empty((len(x), right.shape[1]))
    for start in range(0, len(x), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        distances = lengths - 2 * x[part] @ near.T
        nearest = np.argpartition(distances, number - 1, axis=1)[:, :number]
        found[part] = right[nearest].mean(axis=1)
    return found


def _flattened(trees: list[Any]) -> Arrays:
    """All nodes in a row; a leaf's ``left`` is itself."""
    counts = np.array([tree.node_count for tree in trees])
    roots = np.concatenate([[0], np.cumsum(counts)[:-1]])
    left, right = [], []
    for tree, root in zip(trees, roots, strict=True):
        own = np.arange(tree.node_count)
        leaf = tree.children_left < 0
        left.append(root + np.where(leaf, own, tree.children_left))
        right.append(root + np.where(leaf, own, tree.children_right))
    values = np.concatenate([tree.value[:, :, 0] for tree in trees])
    lefts = np.concatenate(left)
    inner = lefts != np.arange(len(lefts))
    return {
        "roots": roots.astype(np.int32),
        "left": lefts.astype(np.int32),
        "right": np.concatenate(right).astype(np.int32),
        "feature": np.maximum(np.concatenate([t.feature for t in trees]), 0).astype(np.int16),
        "threshold": np.concatenate([t.threshold for t in trees]).astype(np.float32),
        "values": np.where(inner[:, None], 0.0, values).astype(np.float16),
    }


def _of_trees(fitted: Mapping[str, NDArray[Any]], x: NDArray[np.float32]) -> Floats:
    left, right = fitted["left"], fitted["right"]
    feature, threshold = fitted["feature"], fitted["threshold"]
    found = np.empty((len(x), fitted["values"].shape[1]))
    for start in range(0, len(x), _AT_ONCE):
        part = x[start : start + _AT_ONCE]
        rows = np.arange(len(part))[:, None]
        nodes = np.repeat(fitted["roots"][None, :], len(part), axis=0)
        while True:
            lower = part[rows, feature[nodes]] <= threshold[nodes]
            following = np.where(lower, left[nodes], right[nodes])
            if (following == nodes).all():
                break
            nodes = following
        found[start : start + _AT_ONCE] = fitted["values"][nodes].mean(axis=1, dtype=float)
    return found
