"""What it is worth to choose the rows anew in the midst of a run.

A token of a choice whose scores have drifted by d is worth w(d) = 1 + (w - 1)(1 - d) tokens drawn
at random, w the scorer's worth at the share of the pool that is kept: nothing is left of it where
the order of the rows is unrelated to what it was. A fresh choice is made by what is believed after
both looks, (1 - m) z + m z' with m the momentum and corr(z, z') = 1 - d, of which the second look's
share is

    r = ((1 - m)(1 - d) + m) / sqrt((1 - m)^2 + m^2 + 2 m (1 - m)(1 - d))

and will go stale as fast as the present one did, by d over the K tokens since that look. So where
scores turn round as soon as they are followed, choosing anew brings little, and nobody runs after
them. Repeats wear tokens out (D' of ``effective_tokens.py``). For the D tokens that are still to
come, s(a) the mean of min(1, a + d t / K) over t from 0 to D:

    stale  = w(s(d)) (D'(T + D, U) - D'(T, U))         U tokens were chosen, T seen of them
    fresh  = w(s(1 - r)) (D'(T o + D o, U o) - D'(T o, U o) + D'(D (1 - o), U' - U o))
    v      = fresh / stale,     gain = L(now + R) - L(now + v R)

U' = the tokens of the new choice, as many as are worth most of half, the same and twice U; o = the
part of U that it has too, of normal scores, in whose share of U' the tokens to come are given to
them; R = what the budget still spends on training; L = the forecast of the loss. With m = 0 it is
the old scores that choose again, which costs no look: to widen the choice, or to narrow it. What
the FLOPs of a look would bring where they are trained on instead is the price to beat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thrifty.core.budget import Cost
from thrifty.core.contracts import Worth
from thrifty.core.marginal import Choice, Option, choose
from thrifty.drift import Drift
from thrifty.effective_tokens import MAX_EPOCHS, fresh_tokens, worth_of_share
from thrifty.prospect import Prospect

REFRESH = "choose rows anew"
WIDTHS = {"widen the choice": 2.0, "narrow the choice": 0.5}
"""Times as many tokens."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands with the rows that it chose."""

    tokens_left: float
    """To be trained on, as far as the budget goes."""
    tokens_seen: float
    """Of the rows chosen, since the run began."""
    tokens_since_look: float
    """Trained on since the scores were made, in which they drifted."""
    unique: float
    """Tokens of the rows chosen."""
    share: float
    """Of the pool's tokens."""
    drift: Drift
    worth: Worth
    """Of a fresh choice of 5% of the pool."""

    def multiple(self, momentum: float, width: float = 1.0, by: Worth | None = None) -> float:
        """v: how many times as much the tokens to come are worth with another choice of ``width``
        times as many tokens; ``by``: what a scorer that takes over is worth."""
        left, seen, unique = self.tokens_left, self.tokens_seen, max(self.unique, 1.0)
        drifted = max(self.drift.mean, 0.0)
        rate = drifted / max(self.tokens_since_look, 1.0)
        stale = self._worth_at(self.share, _mean_drift(drifted, rate, left))
        believed, second = _mixed(self.drift, momentum)
        part = self._kept(believed, width)
        of_new = part / width
        fresh = 0.0
        if part > 0:
            fresh += _more(part * seen, of_new * left, part * unique)
        if of_new < 1:
            fresh += _more(0.0, (1 - of_new) * left, (width - part) * unique)
        new = self if by is None else replace(self, worth=by)
        worth = new._worth_at(min(width * self.share, 1.0), _mean_drift(1 - second, rate, left))
        return worth * fresh / max(stale * _more(seen, left, unique), 1e-9)

    def overlap(self, momentum: float, width: float = 1.0) -> float:
        """The part of the present choice that the new one has too."""
        return self._kept(_mixed(self.drift, momentum)[0], width)

    def _kept(self, believed: float, width: float) -> float:
        """The same, of normal scores that correlate by ``believed``."""
        from scipy.stats import multivariate_normal, norm

        old, new = min(self.share, 1.0), min(width * self.share, 1.0)
        if believed >= 1 - 1e-9 or max(old, new) >= 1:
            return min(new / old, 1.0)
        below = [float(norm.ppf(old)), float(norm.ppf(new))]  # the area of its opposite above
        both = multivariate_normal.cdf(below, cov=[[1.0, believed], [believed, 1.0]])
        return min(max(float(both) / old, 0.0), 1.0)

    def _worth_at(self, share: float, drifted: float) -> float:
        return 1 + max(worth_of_share(self.worth, share) - 1, 0.0) * (1 - drifted)

    def error(self, momentum: float, width: float = 1.0, by: Worth | None = None) -> float:
        """Of the multiple, by those of the worths and of the drift, which know nothing of one
        another."""
        drift = Drift(self.drift.mean + self.drift.stderr, 0.0)
        here = self.multiple(momentum, width, by)
        errors = [
            replace(self, worth=_further(self.worth)).multiple(momentum, width, by) - here,
            replace(self, drift=drift).multiple(momentum, width, by) - here,
        ]
        if by is not None:
            errors.append(self.multiple(momentum, width, _further(by)) - here)
        return math.hypot(*errors)

    def best_width(self, momentum: float, by: Worth | None = None) -> float:
        """The present one where others are worth no more."""
        widths = [1.0, *self.widths().values()]
        return max(widths, key=lambda width: round(self.multiple(momentum, width, by), 3))

    def widths(self) -> dict[str, float]:
        """Of ``WIDTHS`` those that may be chosen: no fewer rows than leave each with the passes
        that a plan allows it (``MAX_EPOCHS``)."""
        unique = max(self.unique, 1.0)

        def passes(width: float) -> float:
            return self.tokens_seen / unique + self.tokens_left / (width * unique)

        return {n: w for n, w in WIDTHS.items() if w > 1 or passes(w) <= MAX_EPOCHS}


def _further(worth: Worth) -> Worth:
    """By its standard error."""
    return Worth(worth.mean + worth.stderr, 0.0, worth.source)


def _mixed(drift: Drift, momentum: float) -> tuple[float, float]:
    """How what is believed after both looks correlates with the first, and with the second."""
    alike, old = 1 - min(max(drift.mean, 0.0), 2.0), 1 - momentum
    norm = math.sqrt(max(old**2 + momentum**2 + 2 * old * momentum * alike, 0.0))
    if norm < 1e-9:  # of two looks that cancel out nothing is believed
        return 0.0, 0.0
    return (old + momentum * alike) / norm, (old * alike + momentum) / norm


def _mean_drift(start: float, rate: float, left: float) -> float:
    """Of min(1, start + rate t) over t from 0 to ``left``."""
    start = min(start, 1.0)
    until = min(left, (1 - start) / rate) if rate > 0 else left
    if left <= 0:
        return start
    return (start * until + rate * until**2 / 2 + (left - until)) / left


def _more(seen: float, left: float, unique: float) -> float:
    return fresh_tokens(seen + left, unique) - fresh_tokens(seen, unique)


@dataclass(frozen=True, kw_only=True)
class Takeover:
    """Another scorer that may look from here on, by what it is worth by itself: the old beliefs are
    no scores of its own."""

    scorer: str
    worth: Worth
    cost: Cost
    """Of its probe and its short-list."""

    @property
    def name(self) -> str:
        return f"{REFRESH} by {self.scorer}"

    def best_width(self, standing: Standing) -> float:
        return standing.best_width(1.0, self.worth)


def weigh_refresh(
    standing: Standing,
    prospect: Prospect,
    *,
    momentum: float,
    width: float,
    cost: Cost,
    z: float,
    others: Sequence[Takeover] = (),
) -> Choice:
    """Looking again and choosing anew, by the scorer that looks or by one that takes over, against
    training on, which sets the price."""

    def option(name: str, cost: Cost, momentum: float, width: float, by: Worth | None) -> Option:
        v, error = standing.multiple(momentum, width, by), standing.error(momentum, width, by)
        note = f"worth {v:.2f} ± {error:.2f} times the tokens to come, {width:g} times as many rows"
        return Option(name, prospect.gain(v, error), cost, note)

    options = [option(REFRESH, cost, momentum, width, None)]
    for other in others:
        best = other.best_width(standing)
        options.append(option(other.name, other.cost, 1.0, best, other.worth))
    # What the dearest displaces is worth most.
    price = max(prospect.price(option.cost) for option in options)
    return choose(options, resource=prospect.resource, price=price, z=z)


def could_pay(
    standing: Standing,
    prospect: Prospect,
    *,
    momentum: float,
    cost: Cost,
    z: float,
    others: Sequence[Takeover] = (),
) -> bool:
    """Whether a look could have any choice follow it, however far the scores turned out to have
    drifted. ``cost``: of the look too."""
    for drifted in (0.25, 0.5, 0.75, 1.0):
        then = replace(standing, drift=Drift(drifted, 0.0))
        width = then.best_width(momentum)
        choice = weigh_refresh(
            then, prospect, momentum=momentum, width=width, cost=cost, z=z, others=others
        )
        if choice.chosen is not None:
            return True
    return False


def weigh_width(standing: Standing, prospect: Prospect, *, z: float) -> Choice:
    """Choosing more rows, or fewer, by the scores that there are, which costs nothing."""
    options = []
    for name, width in standing.widths().items():
        v, error = standing.multiple(0.0, width), standing.error(0.0, width)
        options.append(
            Option(name, prospect.gain(v, error), Cost(), f"worth {v:.2f} ± {error:.2f}")
        )
    return choose(options, resource=prospect.resource, z=z)
