"""Warm-up, stable, decay: a learning rate under which a run can end well at any moment.

The shape is ``scaling/learning_rate.py``'s. The cool-down's start may be moved to the present at
any step, which is how the governor ends a run early.
"""

from __future__ import annotations

from typing import Any

from thrifty.scaling.learning_rate import WarmupStable


class WarmupStableDecay:
    """The multiplier of the learning rate at optimizer step ``k``, for ``LambdaLR``.

    An object, not a function, so that the scheduler's own checkpoint keeps its state.
    """

    def __init__(
        self, *, max_steps: int, warmup_steps: int, cooldown_steps: int, anew: int = 0
    ) -> None:
        """``anew``: the step from which the rate rises once more, for states that begin there."""
        self.anew = anew
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.cooldown_start = max_steps - cooldown_steps

    def __call__(self, step: int) -> float:
        share = float(self.shape.share(step, self.cooldown_start))
        if self.anew and self.warmup_steps:
            share *= min(1.0, (max(step - self.anew, 0) + 1) / self.warmup_steps)
        return share

    @property
    def shape(self) -> WarmupStable:
        """As it would be whenever the cool-down began."""
        return WarmupStable(self.warmup_steps, self.cooldown_steps)

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
