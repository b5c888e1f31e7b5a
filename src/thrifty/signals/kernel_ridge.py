"""Kernel ridge regression whose damping is chosen by leaving one out.

    a = (K + l I)^-1 y,    the prediction at z:  k(z)^T a,    without i at i:  y_i - a_i / G_ii

with G = (K + l I)^-1: one eigendecomposition of K gives the error of every l (Allen 1974), so that
nothing is fitted twice and no number has to be guessed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_DAMPINGS = 10.0 ** np.arange(-6, 5)
"""Tried, in parts of the kernel's mean diagonal."""


def ridge_coefficients(
    kernel: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``a`` [n, m] for values [n, m], each column under its own best damping; of equals the
    strongest. ``kernel`` [n, n] is symmetric, with no negative eigenvalue."""
    eigenvalues, vectors = np.linalg.eigh(kernel)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    scale = max(float(np.trace(kernel)) / max(len(kernel), 1), 1e-30)
    turned = vectors.T @ values
    least = np.full(values.shape[1], np.inf)
    found = np.zeros_like(values)
    for damping in _DAMPINGS[::-1] * scale:
        inverse = 1.0 / (eigenvalues + damping)
        coefficients = vectors @ (inverse[:, None] * turned)
        diagonal = vectors**2 @ inverse
        errors = ((coefficients / diagonal[:, None]) ** 2).sum(axis=0)
        better = errors < least
        least[better], found[:, better] = errors[better], coefficients[:, better]
    return found


def gaussian_kernel(
    left: NDArray[np.float32], right: NDArray[np.float32], width: float
) -> NDArray[np.float64]:
    """[n, m]: exp(-|x - y|^2 / 2 width^2) of rows [n, d] and [m, d]."""
    return np.exp(-_squared_distances(left, right) / (2 * width**2))


def median_width(rows: NDArray[np.float32]) -> float:
    """The median distance of two different rows; 1 where all are the same."""
    distances = np.sqrt(_squared_distances(rows, rows)[np.triu_indices(len(rows), 1)])
    middle = float(np.median(distances)) if len(distances) else 0.0
    return middle if middle > 1e-6 else 1.0


def _squared_distances(
    left: NDArray[np.float32], right: NDArray[np.float32]
) -> NDArray[np.float64]:
    one, two = left.astype(np.float64), right.astype(np.float64)
    squares = (one**2).sum(1)[:, None] + (two**2).sum(1) - 2 * one @ two.T
    return np.maximum(squares, 0.0)
