"""GradMatch: few weighted rows whose gradient is that of all (Killamsetty et al. 2021,
arXiv:2103.00123).

    min over w >= 0, S of  | sum over i in S of w_i g_i - mean over all i of g_i |^2 + lambda |w|^2

by orthogonal matching pursuit: the row most like what is missing joins S, and the weights of S are
worked out anew. It ends at ``keep`` of the tokens, at ``max_coreset`` rows, or where nothing is
missing that a row could bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from thrifty.core.ranges import check_ranges
from thrifty.signals.coreset_method import CoresetMethod


@dataclass(frozen=True, kw_only=True)
class Gradmatch(CoresetMethod):
    """Few weighted rows whose gradient together is that of all rows."""

    ridge: float = 0.5
    """lambda, in units of the rows' mean squared gradient a row."""
    max_coreset: int = 256

    source: ClassVar[str] = "arXiv:2103.00123"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, ridge=(0, inf), max_coreset=(1, 2_000))

    def coreset(
        self, gradients: NDArray[np.float64], tokens: NDArray[np.float64], max_tokens: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        wanted = gradients.mean(0)
        ridge = self.ridge * float((gradients**2).sum(1).mean()) / len(gradients)
        missing, left = wanted, max_tokens
        kept: list[int] = []
        weights = np.zeros(0)
        open_rows = np.ones(len(gradients), dtype=bool)
        while len(kept) < self.max_coreset:
            gains = np.where(open_rows & (tokens <= left), gradients @ missing, -np.inf)
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            kept.append(best)
            open_rows[best] = False
            left -= tokens[best]
            weights = _ridge(gradients[kept], wanted, ridge)
            missing = wanted - weights @ gradients[kept]
        rows = np.array(kept, dtype=np.int64)
        used = weights > 0
        return rows[used], weights[used]


def _ridge(
    rows: NDArray[np.float64], wanted: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """argmin over w >= 0 of |w rows - wanted|^2 + ridge |w|^2."""
    penalty = np.sqrt(ridge) * np.eye(len(rows))
    return np.asarray(
        nnls(np.vstack([rows.T, penalty]), np.concatenate([wanted, np.zeros(len(rows))]))[0]
    )
