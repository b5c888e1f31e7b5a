"""How sure a fit is: the same fit on runs drawn anew, with replacement, many times.

A draw is how often each run counts in it, so that all draws are fitted together, from the fit to
all runs. The draws answer questions; A and B themselves lie in a flat valley, so that their own
intervals say little of N* and D*.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from thrifty.scaling.descent import Vector

CONFIDENCE = 0.9
AT_ONCE = 60_000
"""Draws times runs that are fitted together: what keeps their arrays in a processor's cache."""


def counts(num_points: int, num_draws: int, seed: int) -> Iterator[Vector]:
    """[some draws, num_points], in parts; draw i depends on the seed and i alone."""
    part = max(1, AT_ONCE // num_points)
    for first in range(0, num_draws, part):
        yield np.array(
            [
                np.random.default_rng([seed, number]).multinomial(
                    num_points, np.full(num_points, 1 / num_points)
                )
                for number in range(first, min(first + part, num_draws))
            ],
            dtype=np.float64,
        )


def interval(values: Any) -> list[float | None]:
    """The ends between which the middle 90% of the draws lie; None where that is no number."""
    values = np.where(np.isnan(values), np.inf, values)
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(values, [tail, 1 - tail], method="nearest")
    return [float(end) if np.isfinite(end) else None for end in ends]
