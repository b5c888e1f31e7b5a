"""Facility location by lazy greedy (Minoux 1978).

    f(S) = sum over i of max over j in S of k_ij

is monotone and submodular, so that greedy is within 1 - 1/e of the best, and a gain once computed
is an upper bound later.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def lazy_greedy(
    likeness: NDArray[np.float64], tokens: NDArray[np.float64], max_tokens: float
) -> NDArray[np.int64]:
    """Places in the order taken, each with the largest gain a token; ``likeness[i, j]``, not
    negative: how well j stands for i."""
    covered = np.zeros(len(likeness))
    bounds = [(-gain, place) for place, gain in enumerate(likeness.sum(0) / tokens)]
    heapq.heapify(bounds)
    kept: list[int] = []
    used = 0.0
    while bounds:
        _, place = heapq.heappop(bounds)
        if used + tokens[place] > max_tokens:
            continue
        gain = np.maximum(likeness[:, place] - covered, 0).sum() / tokens[place]
        if bounds and (-gain, place) > bounds[0]:
            heapq.heappush(bounds, (-gain, place))
            continue
        kept.append(place)
        used += tokens[place]
        covered = np.maximum(covered, likeness[:, place])
    return np.asarray(kept, dtype=np.int64)
