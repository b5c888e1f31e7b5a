"""What a second look at a row would find, predicted from what is cheap.

    z_now = w . [ z_then,  ln tokens,  hashed words and pairs of the text, of unit length ]

a ridge regression fitted on the few rows that were looked at twice, its damping chosen by leaving
one out. It only has to tell which rows are worth the dear look ("proxy, then verify").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.signals.kernel_ridge import ridge_coefficients
from thrifty.signals.ngrams import hashed_ngrams

_BUCKETS = 4096


@dataclass(frozen=True)
class SecondLook:
    """A fitted prediction."""

    weights: NDArray[np.float64]  # [features, num_targets]
    shift: NDArray[np.float64]  # [num_targets]
    lengths: tuple[float, float]
    """Mean and spread of the probe's log lengths."""

    @classmethod
    def fit(
        cls,
        then: NDArray[np.floating],
        now: NDArray[np.floating],
        texts: Sequence[str],
        num_tokens: NDArray[np.int64],
    ) -> SecondLook:
        """On rows looked at twice: standard scores [n, num_targets] each, finite."""
        logs = np.log(num_tokens)
        lengths = float(logs.mean()), float(logs.std()) or 1.0
        features = _features(then, texts, num_tokens, lengths)
        shift = now.mean(axis=0)
        kernel = np.asarray((features @ features.T).todense())
        coefficients = ridge_coefficients(kernel, now - shift)
        return cls(np.asarray(features.T @ coefficients), shift, lengths)

    def predict(
        self, then: NDArray[np.floating], texts: Sequence[str], num_tokens: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """[n, num_targets]."""
        features = _features(then, texts, num_tokens, self.lengths)
        return np.asarray(features @ self.weights) + self.shift


def _features(
    then: NDArray[np.floating],
    texts: Sequence[str],
    num_tokens: NDArray[np.int64],
    lengths: tuple[float, float],
) -> Any:
    from scipy.sparse import csr_array, diags_array, hstack

    counts = hashed_ngrams(texts, _BUCKETS)
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    words = diags_array(1 / np.maximum(norms, 1.0)) @ counts
    plain = np.column_stack([np.nan_to_num(then), (np.log(num_tokens) - lengths[0]) / lengths[1]])
    return csr_array(hstack([csr_array(plain), words]))
