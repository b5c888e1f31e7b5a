"""BIDS: what is chosen stays balanced over the targets (arXiv:2501.12147).

    a_z = (s_z - mean over the pool) / sd over the pool, for each target;
    next = argmax over z left of  max over targets t of ( a_zt - mean over the chosen of a_t )

The row that adds most beyond what the chosen have on average, for the target that it helps most:
targets that the chosen do little for come first. Without normalisation the targets with the largest
scores would take all. The paper has a column for each row of the target; scorers here give one for
each target. Weights of targets do not count: ``balanced`` is the form that has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.core.ordering import best_first

_MOST = 1e9
"""Standard deviations that an infinite score stands for."""


@dataclass(frozen=True, kw_only=True)
class BIDS(Picker):
    """The row that does most for the target that what is chosen does least for."""

    source: ClassVar[str] = "arXiv:2501.12147"

    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked:
        pool = candidates.where(np.argsort(candidates.ids))  # sums depend on their order
        scores = standardised(pool.scores)
        # Whatever the chosen have on average, the best row left for a target is the next in its
        # queue: a turn looks at one row a target, not at all of them.
        turns = best_first(np.zeros(len(pool)), pool.ids, seed).argsort()  # of equals
        queues = []
        for column, known in zip(scores.T, ~np.isnan(pool.scores.T), strict=True):
            order = best_first(column, pool.ids, seed)
            queues.append(order[known[order]].tolist()[::-1])
        tokens = pool.num_tokens.tolist()
        total = np.zeros(scores.shape[1])
        kept: list[int] = []
        taken: set[int] = set()
        used = 0
        while True:
            for queue in queues:  # what does not fit now will not fit later either
                while queue and (queue[-1] in taken or used + tokens[queue[-1]] > max_tokens):
                    queue.pop()
            mean = total / max(len(kept), 1)
            heads = [
                (scores[queue[-1], target] - mean[target], -turns[queue[-1]], queue[-1])
                for target, queue in enumerate(queues)
                if queue
            ]
            if not heads:
                return Picked.of(pool.ids[np.asarray(kept, dtype=np.int64)])
            row = max(heads)[2]
            taken.add(row)
            kept.append(row)
            used += tokens[row]
            total += scores[row]


def standardised(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """[n, num_targets], of mean 0 and standard deviation 1 for each target; 0 = no score."""
    exact = scores.astype(np.float64)
    known = np.isfinite(exact)
    count = np.maximum(known.sum(axis=0), 1)
    centred = exact - np.where(known, exact, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(known, centred, 0.0) ** 2).sum(axis=0) / count)
    units = centred / np.where(spread > 0, spread, 1.0)
    return np.clip(np.nan_to_num(units, nan=0.0, posinf=_MOST, neginf=-_MOST), -_MOST, _MOST)
