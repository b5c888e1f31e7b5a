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
    sample = np.asarray(vectors, dtype=_precision(vectors))
    if len(vectors) > _FITTED_A_CLUSTER * count:
        places = rng.choice(len(vectors), _FITTED_A_CLUSTER * count, replace=False)
        sample = sample[np.sort(places)]
    means = _starts(sample, count, rng)
    for _ in range(iterations):
        sums, sizes = _sums(sample, nearest(sample, means), len(means))
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), means).astype(sample.dtype)
        if np.array_equal(moved, means):
            break
        means = moved
    return nearest(vectors, means)


def _sums(
    vectors: NDArray[np.floating], own: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[count, width] of the vectors of each cluster, and [count, 1] how many they are."""
    from scipy.sparse import csr_array

    members = (np.ones(len(own)), (own, np.arange(len(own))))
    sums = csr_array(members, shape=(count, len(own))) @ vectors.astype(np.float64)
    return sums, np.bincount(own, minlength=count)[:, None]


def _precision(vectors: NDArray[np.floating]) -> type[np.floating]:
    """In which products are made: float32, of what is no wider."""
    return np.float64 if vectors.dtype == np.float64 else np.float32


def _starts(
    sample: NDArray[np.floating], count: int, rng: np.random.Generator
) -> NDArray[np.floating]:
    """k-means++: each start with probability as its squared distance from those before it; fewer
    where there are fewer different vectors."""
    squares = np.einsum("nd,nd->n", sample, sample, dtype=np.float64)
    noise = (1e-6 if sample.dtype == np.float32 else 1e-13) * squares.max()
    means = [place := int(rng.integers(len(sample)))]
    distance = np.full(len(sample), np.inf)
    while len(means) < count:
        apart = squares + squares[place] - 2.0 * (sample @ sample[place])
        distance = np.minimum(distance, np.where(apart > noise, apart, 0.0))
        if not distance.sum() > 0:
            break
        means.append(place := int(rng.choice(len(sample), p=distance / distance.sum())))
    return sample[means]


def nearest(vectors: NDArray[np.floating], means: NDArray[np.floating]) -> NDArray[np.int64]:
    """[n] place of the nearest of ``means`` to each vector, a chunk at a time, in their dtype."""
    found = np.empty(len(vectors), dtype=np.int64)
    squares = (means**2).sum(1)
    for start in range(0, len(vectors), _CHUNK):
        chunk = np.asarray(vectors[start : start + _CHUNK], dtype=means.dtype)
        found[start : start + len(chunk)] = (squares - 2 * chunk @ means.T).argmin(1)
    return found


def connected(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """[count] group of each of ``count`` places: those that ``pairs`` [n, 2] connect share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), dtype=np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
