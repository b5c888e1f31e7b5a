"""Groups of rows: k-means over their vectors or trajectories, and what pairs connect.

    minimise sum_i | v_i - m(c_i) |^2          k-means++ starts, then Lloyd's steps

fitted on a sample; then every row goes to its nearest mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FITTED_A_CLUSTER = 256
"""Rows of the sample for each cluster; more hardly move the means (as in faiss)."""
_CHUNK = 65536


def k_means(
    vectors: NDArray[np.floating], num_clusters: int, seed: int, *, iterations: int = 20
) -> NDArray[np.int64]:
    """[n] cluster of each of the ``[n, width]`` vectors; no more clusters than vectors.

    The same vectors in the same order give the same clusters.
    """
    count = min(num_clusters, len(vectors))
    if count <= 1:
        return np.zeros(len(vectors), dtype=np.int64)
    rng = np.random.default_rng(seed)
    sample = np.asarray(vectors, dtype=np.float64)
    if len(vectors) > _FITTED_A_CLUSTER * count:
        places = rng.choice(len(vectors), _FITTED_A_CLUSTER * count, replace=False)
        sample = sample[np.sort(places)]
    means = _starts(sample, count, rng)
    for _ in range(iterations):
        own = nearest(sample, means)
        sums = np.zeros_like(means)
        np.add.at(sums, own, sample)
        sizes = np.bincount(own, minlength=len(means))[:, None]
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), means)
        if np.array_equal(moved, means):
            break
        means = moved
    return nearest(vectors, means)


def _starts(
    sample: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """k-means++: each start with probability as its squared distance from those before it; fewer
    where there are fewer different vectors."""
    means = [sample[rng.integers(len(sample))]]
    distance = np.full(len(sample), np.inf)
    while len(means) < count:
        distance = np.minimum(distance, ((sample - means[-1]) ** 2).sum(1))
        if not distance.sum() > 0:
            break
        means.append(sample[rng.choice(len(sample), p=distance / distance.sum())])
    return np.stack(means)


def nearest(vectors: NDArray[np.floating], means: NDArray[np.floating]) -> NDArray[np.int64]:
    """[n] place of the nearest of ``means`` to each vector, a chunk at a time."""
    found = np.empty(len(vectors), dtype=np.int64)
    squares = (means**2).sum(1)
    for start in range(0, len(vectors), _CHUNK):
        chunk = np.asarray(vectors[start : start + _CHUNK], dtype=np.float64)
        found[start : start + len(chunk)] = (squares - 2 * chunk @ means.T).argmin(1)
    return found


def connected(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """[count] group of each of ``count`` places: those that ``pairs`` [n, 2] connect share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), dtype=np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
