"""k-means over row vectors or trajectories: fitted on a sample, then every row to its nearest mean.

minimise sum_i | v_i - m(c_i) |^2      k-means++ starts, Lloyd's steps (scipy.cluster.vq)
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
    from scipy.cluster.vq import kmeans2

    count = min(num_clusters, len(vectors))
    if count <= 1:
        return np.zeros(len(vectors), dtype=np.int64)
    rng = np.random.default_rng(seed)
    sample = np.asarray(vectors, dtype=np.float64)
    if len(vectors) > _FITTED_A_CLUSTER * count:
        places = rng.choice(len(vectors), _FITTED_A_CLUSTER * count, replace=False)
        sample = sample[np.sort(places)]
    means, _ = kmeans2(sample, count, iter=iterations, minit="++", missing="warn", rng=rng)
    return nearest(vectors, means)


def nearest(vectors: NDArray[np.floating], means: NDArray[np.floating]) -> NDArray[np.int64]:
    """[n] place of the nearest of ``means`` to each vector, a chunk at a time."""
    found = np.empty(len(vectors), dtype=np.int64)
    squares = (means**2).sum(1)
    for start in range(0, len(vectors), _CHUNK):
        chunk = np.asarray(vectors[start : start + _CHUNK], dtype=np.float64)
        found[start : start + len(chunk)] = (squares - 2 * chunk @ means.T).argmin(1)
    return found
