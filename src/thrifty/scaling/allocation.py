"""What to spend compute on: the best N and D for a budget, the least budget for a loss, the price.

    L*(C) = min over N of L(N, D),    C = k N D + s N W                     (arXiv:2401.00448)
    lambda(C) = |dL*/dC|

C = FLOPs, k = FLOPs of training a parameter and token (6: forward and backward of the linears,
without attention), s = of serving (2: forward), W = tokens that the model will serve. thrifty's own
counts give k and s of an architecture: ``train_flops`` and ``forward_flops`` (``costs/flops.py``)
over tokens and parameters.

``lambda`` is the shadow price of a budget: what a FLOP more of it brings where N and D are free. A
run whose own gain a FLOP is below it is past its best use of compute; at the optimum the two are
equal (envelope theorem).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from thrifty.core.quantities import format_flops, short
from thrifty.scaling.asking import knows_parameters
from thrifty.scaling.laws import Law, Number

GRID, ROUNDS, HALVINGS = 65, 8, 48
FLOPS = (1e3, 1e40)
"""Between which the least budget for a loss is looked for."""
STEP = 1e-3
"""Of log C, in the difference that gives the price."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which compute is spent."""

    unique: float = np.inf
    """U: different tokens that there are."""
    served: float = 0.0
    """W: tokens that the trained model will serve."""
    training: float = 6.0
    """k: FLOPs of training, a parameter and token."""
    serving: float = 2.0
    """s: of serving."""

    def tokens(self, flops: Number, N: Number) -> Number:
        """D that ``flops`` leave for ``N`` parameters; below zero where serving takes them all."""
        return (flops / N - self.serving * self.served) / self.training

    def flops(self, N: Number, D: Number) -> Number:
        return N * (self.training * D + self.serving * self.served)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The best use of a budget; arrays where the law's numbers are."""

    flops: Number
    N: Number
    D: Number
    loss: Number
    price: Number
    """Nats a FLOP."""
    epochs: Number
    """D over the unique tokens; at least 1."""
    last_epoch_worth: Number
    """Of a token of the last epoch, in fresh ones."""


PLAIN = Conditions()


def best_for_flops(law: Law, flops: Number, conditions: Conditions = PLAIN) -> Allocation:
    """N and D with the least loss that ``flops`` buy, serving included."""
    _check(law)
    N = _best_parameters(law, flops, conditions)
    D = conditions.tokens(flops, N)
    epochs = np.maximum(D / conditions.unique, 1.0)
    return Allocation(
        flops=flops + 0.0 * N,
        N=N,
        D=D,
        loss=law.loss(N, D, conditions.unique),
        price=price(law, flops, conditions),
        epochs=epochs,
        last_epoch_worth=np.exp(-(epochs - 1.0) / law.R_D),
    )


def least_for_loss(law: Law, loss: Number, conditions: Conditions = PLAIN) -> Allocation:
    """The smallest budget that reaches ``loss``, and its use; infinite FLOPs where none does.

    Raises ValueError where no budget reaches it under a single law.
    """
    _check(law)
    low, high = (np.log(end) + 0.0 * np.asarray(law.E) for end in FLOPS)
    reached = _frontier(law, np.exp(high), conditions) <= loss
    for _ in range(HALVINGS):  # the frontier falls with the budget
        middle = (low + high) / 2
        enough = _frontier(law, np.exp(middle), conditions) <= loss
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    if np.ndim(law.E) == 0 and not reached:
        least = float(_frontier(law, FLOPS[1], conditions))
        raise ValueError(
            f"no budget reaches a loss of {loss:g}: this law ends at {least:.4g}\n"
            "hint: a higher loss, or more unique tokens where those are few"
        )
    flops = np.where(reached, np.exp(high), np.inf)[()]
    return best_for_flops(law, flops, conditions)


def price(law: Law, flops: Number, conditions: Conditions = PLAIN) -> Number:
    """lambda(C) = |dL*/dC|, nats a FLOP, of the frontier of ``law`` at a budget of ``flops``."""
    _check(law)
    less, more = (_frontier(law, flops * np.exp(side), conditions) for side in (-STEP, STEP))
    return (less - more) / (2 * STEP * flops)


def own_slope(law: Law, N: Number, D: Number, conditions: Conditions = PLAIN) -> Number:
    """|dL/dC| of a run that goes on with ``N`` parameters, after ``D`` tokens."""
    less, more = (law.loss(N, D * np.exp(side), conditions.unique) for side in (-STEP, STEP))
    return (less - more) / (2 * STEP * D * N * conditions.training)


def _frontier(law: Law, flops: Number, conditions: Conditions) -> Number:
    N = _best_parameters(law, flops, conditions)
    return law.loss(N, conditions.tokens(flops, N), conditions.unique)


def _best_parameters(law: Law, flops: Number, conditions: Conditions) -> Number:
    """Where nothing is served and nothing repeats in closed form, otherwise by search."""
    if conditions.served == 0 and np.all(np.isinf(conditions.unique)):
        a = law.beta / (law.alpha + law.beta)
        ratio = law.alpha * law.A / (law.beta * law.B)
        return ratio ** (1 / (law.alpha + law.beta)) * (flops / conditions.training) ** a
    return _searched(law, flops, conditions)


def _searched(law: Law, flops: Number, conditions: Conditions) -> Number:
    """Over log N."""

    def loss(log_N: Number) -> Number:
        N = np.exp(log_N)
        D = conditions.tokens(flops, N)
        found = law.loss(N, np.maximum(D, 1e-300), conditions.unique)
        return np.where(D > 0, found, np.inf)

    one_token = flops / (conditions.training + conditions.serving * conditions.served)
    most = np.log(one_token) + 0.0 * law.E  # one for each law
    return np.exp(_least(loss, 0.0 * most, most))


def _least(function: Callable[[Number], Number], low: Number, high: Number) -> Number:
    """Where ``function``, of one valley, is least between ``low`` and ``high``, elementwise: the
    best of a grid, then of one between its neighbours, and so on."""
    for _ in range(ROUNDS):
        grid = np.linspace(low, high, GRID)
        with np.errstate(over="ignore", invalid="ignore"):
            values = function(grid)
        best = np.argmin(np.where(np.isnan(values), np.inf, values), axis=0)[None]
        low, high = (
            np.take_along_axis(grid, np.clip(best + side, 0, GRID - 1), axis=0)[0]
            for side in (-1, 1)
        )
    return (low + high) / 2


def _check(law: Any) -> None:
    if not knows_parameters(law):
        raise ValueError(
            "this law knows tokens alone, not parameters, so that nothing can be allocated\n"
            "hint: fit one with --form chinchilla, to runs of several sizes"
        )


def check_budget(flops: float, conditions: Conditions) -> None:
    """Raise ValueError where serving alone takes more than ``flops``."""
    served = conditions.serving * conditions.served
    if flops <= 1e3 * (conditions.training + served):
        raise ValueError(
            f"{format_flops(flops)} do not train a thousand parameters and serve "
            f"{short(conditions.served)} tokens with them\n"
            "hint: a larger --flops, a smaller --serve"
        )
