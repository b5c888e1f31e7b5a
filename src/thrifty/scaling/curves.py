"""Where a run's loss will be: a forecast with its error bar from the run's own evaluations, which
knows the learning rate still to come and how noisy the evaluations are (``posterior.py``).

What is not known does not stop it: an evaluation whose loss is not finite is left out; where a
standard error is not finite, as with a dev set of one row, the scatter of the losses stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thrifty.core.contracts import Evaluation
from thrifty.scaling.annealing import CoolDown
from thrifty.scaling.posterior import Posterior, condition

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_STEPS = 1 << 22
"""That a forecast looks ahead; what is further is as good as there."""


@dataclass(frozen=True)
class Forecast:
    """What the next evaluation will show at ``flops``, and how the run would end."""

    flops: float
    loss: float
    loss_stderr: float
    gain: float
    """Of one more interval: by how much the run ends better than if it is let down now."""
    gain_stderr: float
    final: float | None = None
    """The loss at the end of a cool-down that begins now."""
    final_stderr: float | None = None
    final_flops: float | None = None
    """Spent by then."""
    wrong: float | None = None
    """P(a stop now would be wrong): that training on, for an interval or up to all that remains,
    gains more than its price."""


def foresee(
    history: Sequence[Evaluation],
    courses: Sequence[NDArray[np.float64]],
    cool_down: CoolDown | None = None,
) -> Posterior | None:
    """The losses at the end of each of ``courses``. None with fewer than two finite losses.

    A course: the share of the peak learning rate at every step of a run, the past ones included, in
    which all agree.
    """
    known = [e for e in history if np.isfinite(e.loss)]
    if len(known) < 2:
        return None
    errors = np.array([e.stderr for e in known])
    errors[~(np.isfinite(errors) & (errors > 0))] = 0.0
    errors[0] = np.median(errors[1:])  # the first is of the loss itself, not of a change
    return condition(
        np.array([e.step for e in known]),
        np.array([e.loss for e in known]),
        errors,
        courses,
        cool_down or CoolDown(),
    )


def forecast(
    history: Sequence[Evaluation],
    flops: float,
    course: NDArray[np.float64] | None = None,
    cool_down: CoolDown | None = None,
) -> tuple[float, float] | None:
    """Mean and standard error of the loss when the run will have spent ``flops``.

    ``course``: the shares of the learning rate, from the first step to that point at least; None:
    it stays as it is. Steps take what they took between the first and the last evaluation. None
    with fewer than two finite losses.
    """
    steps = steps_at(history, flops)
    if steps is None:
        return None
    course = np.ones(steps) if course is None else course[:steps]
    seen = foresee(history, [course], cool_down)
    return None if seen is None else seen.loss(0)


def steps_at(history: Sequence[Evaluation], flops: float) -> int | None:
    """Steps taken by the time ``flops`` are spent; None where the history does not tell."""
    first, last = history[0], history[-1]
    steps, spent = last.step - first.step, last.flops - first.flops
    if steps <= 0 or not spent > 0:
        return None
    return last.step + int(min(max(round((flops - last.flops) * steps / spent), 0), MOST_STEPS))
