"""What a model of N parameters reaches on D tokens, of which U are different ones.

    L(N, D, U) = E + A / N'^alpha + B / D'^beta                             (arXiv:2203.15556)
    D' = U_D + U_D R_D (1 - exp(-(D / U_D - 1) / R_D)),   U_D = min(U, D)   (arXiv:2305.16264)
    N' = U_N + U_N R_N (1 - exp(-(N / U_N - 1) / R_N)),   U_N = min(N, N_opt(U_D))

N = parameters, D = tokens trained on, U = unique tokens, L = loss in nats a token, E = the loss
that nothing gets below, N_opt(D) = the parameters that D fresh tokens are spent on best, R_D and
R_N = how many repeats, and how many times too many parameters, are worth something. Without limit
(the default) a repeated token is worth a fresh one: Chinchilla's own form.

The numbers of a law may be arrays: it then is as many laws at once (the draws of a bootstrap), and
all that is asked of it is answered by each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np

Number = Any
"""A float, or an array of them: one for each law."""

MOST_REPEATS = 1e4
"""A fit that finds more than so many repeats worthwhile has found no limit to them."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """Loss of parameters and tokens; ``A`` = 0 where nothing is known of parameters."""

    E: Number
    A: Number
    B: Number
    alpha: Number
    beta: Number
    R_D: Number = np.inf
    R_N: Number = np.inf

    def loss(self, N: Number, D: Number, unique: Number = np.inf) -> Number:
        """Of ``N`` parameters after ``D`` tokens, ``unique`` of them different."""
        fresh = np.minimum(unique, D)
        tokens = effective(D, fresh, self.R_D)
        parameters = N
        if np.any(np.isfinite(self.R_N)):
            parameters = effective(N, np.minimum(N, self.parameters_for(fresh)), self.R_N)
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def parameters_for(self, D: Number) -> Number:
        """Those on which ``D`` fresh tokens are spent best: alpha A / N^alpha = beta B / D^beta."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return ratio ** (1 / self.alpha) * D ** (self.beta / self.alpha)

    def tokens_for(self, N: Number) -> Number:
        """The fresh tokens that ``N`` parameters are spent on best."""
        ratio = self.beta * self.B / (self.alpha * self.A)
        return ratio ** (1 / self.beta) * N ** (self.alpha / self.beta)


def effective(amount: Number, fresh: Number, worthwhile: Number) -> Number:
    """What ``amount`` is worth in fresh units, where only ``fresh`` of it is, and ``worthwhile``
    repeats of that are worth something."""
    repeats = amount / fresh - 1.0
    limited = np.isfinite(worthwhile)
    finite = np.where(limited, worthwhile, 1.0)
    return np.where(limited, fresh - fresh * finite * np.expm1(-repeats / finite), amount)


Any_Law = TypeVar("Any_Law")


def limit_of(log_repeats: Number) -> Number:
    """exp, or without limit."""
    none = log_repeats > np.log(MOST_REPEATS)
    return np.where(none, np.inf, np.exp(np.where(none, 0.0, log_repeats)))


def together(laws: Sequence[Any_Law]) -> Any_Law:
    """Several laws of one form, each of many draws, as one of all their draws."""
    first: Any = laws[0]
    values = {f.name: [np.atleast_1d(getattr(law, f.name)) for law in laws] for f in fields(first)}
    found: Any_Law = type(first)(**{name: np.concatenate(each) for name, each in values.items()})
    return found


def single(law: Any_Law) -> Any_Law:
    """A law of plain floats."""
    given: Any = law
    found: Any_Law = type(given)(**{f.name: float(getattr(given, f.name)) for f in fields(given)})
    return found


def numbers(law: Any) -> dict[str, Any]:
    """The numbers of a law by name; those without limit left out."""
    return {name: value for name, value in asdict(law).items() if np.all(np.isfinite(value))}
