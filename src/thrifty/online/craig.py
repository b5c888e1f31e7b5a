"""CRAIG: rows whose gradients stand for all others' (Mirzasoleiman et al. 2020, arXiv:1906.01827).

    S = argmax sum over i of max over j in S of (c - |g_i - g_j|),    w_j = how many i are next to j

c the largest distance. By lazy greedy within ``keep`` of the tokens, a gain a token; of the model
as it is, ``renewals`` times in a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from thrifty.signals.coreset_method import CoresetMethod
from thrifty.signals.submodular import lazy_greedy


@dataclass(frozen=True, kw_only=True)
class Craig(CoresetMethod):
    """Rows whose gradients stand for all others', weighted by how many they stand for."""

    source: ClassVar[str] = "arXiv:1906.01827"

    def coreset(
        self, gradients: NDArray[np.float64], tokens: NDArray[np.float64], max_tokens: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        distances = cdist(gradients, gradients)
        kept = lazy_greedy(distances.max() - distances + 1e-12, tokens, max_tokens)
        if not len(kept):
            return kept, np.ones(0)
        nearest = distances[:, kept].argmin(1)
        return kept, np.bincount(nearest, minlength=len(kept)).astype(np.float64)
