"""What letting the learning rate down brings: the schedule's part of the multi-power law.

    LD(t) = B sum_k (eta_{k-1} - eta_k) G(eta_k^-gamma S_k(t) / S_1(k))
    G(x) = 1 - (C x + 1)^-beta

(arXiv:2503.12811.) eta_k: the rate at step k as a share of its peak; S_k(t) = eta_k + ... + eta_t:
the rate summed since; B: the loss that a whole cool-down takes off in the end, here as a share of
the loss. Only what falls after the peak counts: the warm-up raises no loss.

The paper's clock is S_k(t) itself, in steps. Here it is S_k(t) over S_1(k), all that came before
the fall, so that C has no unit and carries over from runs of 70,000 steps to runs of 50
(docs/forecasts.md has both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_DROPS = 256
"""Of the rate that are told apart; more are taken together."""
LEAST_SHARE = 1e-3
"""eta^-gamma at a rate of zero would be infinite, where nothing moves any more."""


@dataclass(frozen=True)
class CoolDown:
    """A prior on what a cool-down brings. One that has not begun says nothing about it, so that
    other runs have to."""

    gain: float = 0.045
    """B as a share of the loss."""
    gain_stderr: float = 0.015
    rates: Sequence[float] = (5.0, 20.0, 80.0)
    """C, those tried."""
    beta: float = 2.2
    gamma: float = 0.7
    drift: Sequence[float] = (0.01, 0.05)
    """By how much, as a share of the loss, what it brings departs from the law's shape over a whole
    cool-down; those tried."""
    growth: float = 0.02
    """By how much, as a share of the loss, it changes until the rate summed has grown e-fold."""
    source: str = "arXiv:2503.12811 at 25M and 100M, gemstones, nanogpt: docs/forecasts.md"


def annealed(
    shares: NDArray[np.float64], steps: NDArray[np.int64], cool_down: CoolDown, rate: float
) -> NDArray[np.float64]:
    """LD / B after ``steps`` steps each, [n]: 0 before the rate first falls, 1 long after it is 0.

    ``shares``: of every step from the first on.
    """
    if not len(shares):
        return np.zeros(len(steps))
    summed = np.concatenate([[0.0], np.cumsum(shares)])
    fallen = np.zeros(len(shares))
    fallen[1:] = -np.diff(shares)
    fallen[: int(np.argmax(shares)) + 1] = 0.0
    at = np.flatnonzero(fallen)
    if not len(at):
        return np.zeros(len(steps))
    edges = np.linspace(0, len(at), min(len(at), MOST_DROPS) + 1).astype(int)
    size = np.add.reduceat(fallen[at], edges[:-1])
    middle = at[(edges[:-1] + edges[1:]) // 2]
    before = summed[middle]
    pace = rate * np.maximum(shares[middle], LEAST_SHARE) ** -cool_down.gamma / before
    x = np.maximum(summed[steps][:, None] - before, 0.0) * pace
    return np.asarray((1.0 - (x + 1.0) ** -cool_down.beta) @ size)
