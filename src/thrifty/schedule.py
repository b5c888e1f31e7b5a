"""Warm-up, stable, decay: a learning rate under which a run can end well at any moment.

    eta_k / eta = min(1, (k + 1) / warmup)                        before the cool-down
    eta_k / eta = 1 - sqrt((k - s + 1) / (cooldown + 1))          from its start s on

The 1 - sqrt shape and a cool-down of a fifth of the run are those that arXiv:2405.18392 found to
match a cosine of the right length. The start may be moved to the present at any step, which is how
the governor ends a run early.
"""

from __future__ import annotations

import math
from typing import Any


class WarmupStableDecay:
    """The multiplier of the learning rate at optimizer step ``k``, for ``LambdaLR``.

    An object, not a function, so that the scheduler's own checkpoint keeps its state.
    """

    def __init__(self, *, max_steps: int, warmup_steps: int, cooldown_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.cooldown_start = max_steps - cooldown_steps

    def __call__(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if step < self.cooldown_start:
            return rise
        fallen = (step - self.cooldown_start + 1) / (self.cooldown_steps + 1)
        return rise * max(0.0, 1.0 - math.sqrt(min(1.0, fallen)))

    @property
    def end(self) -> int:
        """The step at which the cool-down, as it now stands, is over."""
        return self.cooldown_start + self.cooldown_steps

    def cool_down_from(self, step: int, scheduler: Any = None) -> None:
        """Start the cool-down at ``step`` if it has not started; ``scheduler``'s rate follows."""
        if step >= self.cooldown_start:
            return
        self.cooldown_start = step
        if scheduler is not None:  # the rate of this step was set before the decision
            self.set_rate(scheduler, step)

    def set_rate(self, scheduler: Any, step: int) -> None:
        """The rate of ``step`` as it now is, in the optimizer."""
        groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True)
        for group, base in groups:
            group["lr"] = base * self(step)
