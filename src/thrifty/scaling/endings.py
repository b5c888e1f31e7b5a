"""How a run would end: let down now, or trained for longer and let down then.

    gain(k) = L_end(now) - L_end(k intervals more)      both after the same cool-down
    P(a stop now is wrong) = max_k P(gain(k) > price k c),       c = an interval's cost

k: one interval, two, four and so on, and all that remain. The two ends share the curve and what the
cool-down brings, so that their difference is far surer than either.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import numpy as np

from thrifty.core.contracts import Evaluation, Outlook
from thrifty.scaling.curves import MOST_STEPS, Forecast, foresee
from thrifty.scaling.learning_rate import WarmupStable

MOST_INTERVALS = 64
"""Looked ahead where nothing limits them."""


def endings(history: Sequence[Evaluation], outlook: Outlook) -> Forecast | None:
    """What ``history`` says of the run's end. None with fewer than two finite losses, or where the
    last evaluation has none."""
    if not history or not isfinite(history[-1].loss):
        return None
    now, interval = history[-1].step, _interval_steps(history, outlook)
    schedule = outlook.schedule or WarmupStable()
    horizons = _horizons(outlook, interval)
    ends = [schedule.shares(now + k * interval) for k in (0, *horizons)]
    still_up = schedule.share(np.arange(now + interval), inf)
    seen = foresee(history, [*ends, still_up])
    if seen is None:
        return None
    each = outlook.next_interval.flops / interval
    price = outlook.price * (outlook.next_interval.of(outlook.resource) or 0.0)
    wrong = [seen.odds(0, i, price * k) for i, k in enumerate(horizons, 1)]
    loss, loss_stderr = seen.loss(len(ends))
    gain, gain_stderr = seen.gain(0, 1)
    final, final_stderr = seen.loss(0)
    return Forecast(
        flops=history[-1].flops + outlook.next_interval.flops,
        loss=loss,
        loss_stderr=loss_stderr,
        gain=gain,
        gain_stderr=gain_stderr,
        final=final,
        final_stderr=final_stderr,
        final_flops=history[-1].flops + each * schedule.cooldown_steps,
        wrong=max(wrong),
    )


def _interval_steps(history: Sequence[Evaluation], outlook: Outlook) -> int:
    if outlook.interval_steps:
        return outlook.interval_steps
    return max(history[-1].step - history[-2].step, 1) if len(history) > 1 else 1


def _horizons(outlook: Outlook, interval: int) -> list[int]:
    """Intervals ahead: one at least, as many as the budget and the plan have room for at most."""
    left = outlook.remaining.of(outlook.resource)
    each = outlook.next_interval.of(outlook.resource)
    affordable = left / each if left is not None and each else inf
    most = min(affordable, outlook.intervals_left, MOST_INTERVALS, MOST_STEPS // interval)
    last = max(int(most), 1)
    return [*(2**i for i in range(last.bit_length()) if 2**i < last), last]


def odds_text(seen: Forecast | None) -> str:
    """The odds that a stop now would be wrong, to stand at the end of a reason."""
    if seen is None or seen.wrong is None:
        return "the odds that a stop is wrong are not known"
    share = "under 1%" if seen.wrong < 0.01 else f"{100 * seen.wrong:.0f}%"
    return f"a stop now is wrong with odds of {share}"
