"""What a pilot makes of its short trainings: the loss that each choice of data would end at.

    gain_c = L(base) - L_c(F_c)

L_c: the forecast from the candidate's own dev losses (``scaling/curves.py``); F_c: the training
FLOPs that the rest of the budget buys it, what its scoring still costs taken off. The learning rate
stays as it is: what the cool-down to come brings is the same for all. So is most of what makes a
forecast from so short a run unsure, how curves bend in general; what tells candidates apart is the
noise of their own evaluations, and the standard error is what that makes of the forecast. The rule
takes the first-named candidate, the incumbent, unless another's lower bound is above its upper one:
a tie is `uniform`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation
from thrifty.core.marginal import Choice, Estimate, Option, choose
from thrifty.scaling.curves import foresee, steps_at

Z = 1.0
"""Standard errors by which a gain must be sure."""
DRAWS = 32
"""Of the noise."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate's short training so far."""

    name: str
    history: Sequence[Evaluation]
    """With the FLOPs of its own training alone."""
    flops: float
    """That its training would have in the run."""


def gain_of(trial: Trial, unit: str) -> Estimate | None:
    """By the end of the run that would follow; None where there is too little to tell."""
    history = trial.history
    steps = steps_at(history, trial.flops) if len(history) > 1 else None
    seen = None if steps is None else foresee(history, [np.ones(steps)])
    if steps is None or seen is None:
        return None
    random = np.random.default_rng(0)
    ends = []
    for _ in range(DRAWS):
        shifts = random.normal(0.0, seen.noise, len(history))
        # The base model's evaluation is the same for all.
        other = [history[0], *map(_shifted, history[1:], shifts[1:].tolist())]
        again = foresee(other, [np.ones(steps)])
        assert again is not None, "as many losses as before"
        ends.append(again.loss(0)[0])
    gain = history[0].loss - seen.loss(0)[0]
    return Estimate(gain, float(np.std(ends)), unit, "pilot")


def _shifted(evaluation: Evaluation, by: float) -> Evaluation:
    return replace(evaluation, loss=evaluation.loss + by)


def weigh(
    gains: Mapping[str, Estimate], notes: Mapping[str, str], left: Cost, resource: str
) -> Choice:
    """Which choice of data the rest of the budget, ``left``, goes to. The first-named is the
    incumbent."""
    options = [Option(name, gain, left, notes.get(name, "")) for name, gain in gains.items()]
    incumbent = options[0].name if options else None
    return choose(options, resource=resource, incumbent=incumbent, z=Z)
