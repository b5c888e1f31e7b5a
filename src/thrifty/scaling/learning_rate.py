"""The learning rate of a run as shares of its peak: a number a step, past and still to come.

    eta_k / eta = min(1, (k + 1) / warmup)                        before the cool-down
    eta_k / eta = 1 - sqrt((k - s + 1) / (cooldown + 1))          from its start s on

The 1 - sqrt shape and a cool-down of a fifth of the run are those that arXiv:2405.18392 found to
match a cosine of the right length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class WarmupStable:
    """Up, then level, then down from whichever step the cool-down is begun at."""

    warmup_steps: int = 0
    cooldown_steps: int = 0

    def share(self, step: ArrayLike, start: float) -> NDArray[np.float64]:
        """Of the peak at optimizer steps ``step``, where the cool-down starts at step ``start``."""
        step = np.asarray(step, float)
        rise = np.minimum(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fallen = np.clip((step - start + 1) / (self.cooldown_steps + 1), 0.0, 1.0)
        return np.asarray(rise * (1.0 - np.sqrt(fallen)))

    def shares(self, start: int) -> NDArray[np.float64]:
        """Of every step of a run that is let down from ``start`` on."""
        return self.share(np.arange(start + self.cooldown_steps), start)
