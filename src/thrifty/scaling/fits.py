"""A law from runs: which forms there are, what each needs to be told apart, and how sure it is.

    chinchilla        E + A / N^alpha + B / D^beta            from N, D, loss
    data_constrained  the same with repeats (``laws.py``)     from N, D, unique, loss
    tokens            E + B / D^beta                          from D, loss
    fine_tuning       E + B / (D_l + D^beta)                  from D, loss
    filtered          E + A / D^b, b halved by repeats        from D, unique, loss

All by Huber's loss on log loss (``huber.py``), with outliers set aside and a bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.typed import nearest
from thrifty.scaling.asking import loss_of
from thrifty.scaling.bootstrap import counts, interval
from thrifty.scaling.descent import Vector
from thrifty.scaling.filtered_data import Filtered, fit_filtered
from thrifty.scaling.fine_tuning import Rectified, fit_rectified
from thrifty.scaling.huber import huber
from thrifty.scaling.laws import Law, numbers, single, together
from thrifty.scaling.outliers import without_outliers
from thrifty.scaling.points import Points
from thrifty.scaling.repeats import fit_repeats
from thrifty.scaling.sum_of_powers import fit_powers

DRAWS = 200
LEAST_DIFFERENT = 3
"""Values that a term needs, to be told from the loss that nothing gets below."""
ON_A_LINE = 0.9995
"""Correlation of log N and log D from which on their terms cannot be told apart."""

POOR = 0.05
"""Mean relative error on a law's own runs from which on it is told."""


@dataclass(frozen=True)
class Form:
    """A law's form: how it is fitted, and what of a run it looks at."""

    estimate: Callable[[Points, Vector, Any], Any]
    """Runs, their weights, a law to start from -> a law; with weights [draws, n] one for each."""
    title: str
    needs: tuple[str, ...]
    cls: type[Law] | type[Rectified] | type[Filtered]
    num_numbers: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with what it came from and how sure it is."""

    form: str
    law: Any
    """``Law``, ``Rectified`` or ``Filtered``."""
    draws: Any
    """The same with arrays; None where there are none."""
    objective: float
    """Huber's loss over the runs that were kept."""
    points: Points
    kept: NDArray[np.bool_]
    source: str

    @property
    def intervals(self) -> dict[str, list[float | None]]:
        """Of the law's own numbers."""
        if self.draws is None:
            return {}
        return {name: interval(values) for name, values in numbers_of(self.draws, self.law).items()}


def numbers_of(draws: Any, law: Any) -> dict[str, Any]:
    """The draws' numbers, of those that ``law`` has."""
    return {name: getattr(draws, name) for name in numbers(law)}


def fit_law(
    points: Points,
    form: str,
    *,
    num_draws: int = DRAWS,
    seed: int = 0,
    source: str = "",
) -> Fit:
    """The law of ``points``, its outliers set aside, with ``num_draws`` of the bootstrap.

    Raises ValueError where the runs do not tell all of the law's numbers.
    """
    known = form_named(form)

    def estimate(some: Points) -> Any:
        return single(known.estimate(some, np.ones(len(some)), None))

    law, kept = without_outliers(estimate, log_errors, points, known.num_numbers)
    inside = points.take(kept)
    draws = None
    if num_draws:
        drawn = counts(len(inside), num_draws, seed)
        draws = together([known.estimate(inside, weights, law) for weights in drawn])
    return Fit(
        form=form,
        law=law,
        draws=draws,
        objective=float(huber(log_errors(law, inside)).sum()),
        points=points,
        kept=kept,
        source=source,
    )


def log_errors(law: Any, points: Points) -> NDArray[np.float64]:
    """log of the loss over the law's, [n]."""
    loss = loss_of(law, points.N, points.D, points.unique)
    errors: NDArray[np.float64] = points.log_loss - np.log(loss)
    return errors


# -- the forms ----------------------------------------------------------------------------------


def estimate_chinchilla(points: Points, weights: Vector, near: Law | None) -> Law:
    _check(points, ("N", "D"), 5)
    logs = np.log(np.stack([points.N, points.D]))
    start = None
    if near is not None:
        start = np.array([near.E, near.A, near.B, near.alpha, near.beta])
    E, A, B, alpha, beta = fit_powers(logs, points.log_loss, weights, start)
    return Law(E=E, A=A, B=B, alpha=alpha, beta=beta, R_D=np.inf + 0 * E, R_N=np.inf + 0 * E)


def estimate_tokens(points: Points, weights: Vector, near: Law | None) -> Law:
    _check(points, ("D",), 3)
    start = None if near is None else np.array([near.E, near.B, near.beta])
    E, B, beta = fit_powers(np.log(points.D)[None], points.log_loss, weights, start)
    none = 0.0 * E
    return Law(E=E, A=none, B=B, alpha=none + 1, beta=beta, R_D=none + np.inf, R_N=none + np.inf)


def estimate_data_constrained(points: Points, weights: Vector, near: Law | None) -> Law:
    """In two stages: what fresh tokens bring from the runs that repeat none, then the repeats."""
    fresh = ~points.repeated
    if fresh.all():
        raise ValueError(
            "no run repeats its tokens, so that nothing tells what a repeat is worth\n"
            "hint: --form chinchilla, or a column unique_tokens with fewer than tokens"
        )
    try:
        law = estimate_chinchilla(points.take(fresh), weights[..., fresh], near)
    except ValueError as error:
        raise ValueError(f"of the runs that repeat nothing: {error}") from None
    return fit_repeats(law, points, weights, near)


def estimate_fine_tuning(points: Points, weights: Vector, near: Rectified | None) -> Rectified:
    _check(points, ("D",), 4, from_zero=True)
    return fit_rectified(points, weights, near)


def estimate_filtered(points: Points, weights: Vector, near: Filtered | None) -> Filtered:
    _check(points, ("D",), 4)
    if not points.repeated.any():
        raise ValueError(
            "no run repeats its tokens, so that nothing tells how fast they wear out\n"
            "hint: --form tokens, or runs that go through their unique tokens several times"
        )
    return fit_filtered(points, weights, near)


def _check(
    points: Points, columns: tuple[str, ...], num_numbers: int, *, from_zero: bool = False
) -> None:
    """Raise ValueError where the points do not tell all numbers of a law of ``columns``."""
    if len(points) <= num_numbers:
        raise ValueError(
            f"{len(points)} runs do not tell the {num_numbers} numbers of this law\n"
            f"hint: at least {num_numbers + 1}, better several times as many"
        )
    words = {"N": "parameters", "D": "tokens"}
    for name in columns:
        values = getattr(points, name)
        if not from_zero and not np.all(values > 0):
            raise ValueError(
                "a run on 0 tokens has no place in this law\n"
                "hint: leave it out, or --form fine_tuning for a model that was trained before"
            )
        different = len(np.unique(values))
        if different < LEAST_DIFFERENT:
            alone = {"N": "--form tokens fits D alone", "D": "no form of N alone is built"}[name]
            raise ValueError(
                f"all runs have {different} number{'s' * (different > 1)} of {words[name]}, so "
                f"that the {name} term cannot be told from E\n"
                f"hint: add runs with at least {LEAST_DIFFERENT} different ones; {alone}"
            )
    if columns == ("N", "D"):
        logs = np.log([points.N, points.D])
        if abs(np.corrcoef(logs)[0, 1]) > ON_A_LINE:
            raise ValueError(
                "N and D grow together in all runs, so that their terms cannot be told apart\n"
                "hint: add runs with more or fewer tokens a parameter; --form tokens fits D alone"
            )


FORMS = {
    "chinchilla": Form(estimate_chinchilla, "E + A / N^alpha + B / D^beta", ("N", "D"), Law, 5),
    "data_constrained": Form(
        estimate_data_constrained,
        "E + A / N'^alpha + B / D'^beta, repeats weighed,",
        ("N", "D", "unique"),
        Law,
        7,
    ),
    "tokens": Form(estimate_tokens, "E + B / D^beta", ("D",), Law, 3),
    "filtered": Form(
        estimate_filtered, "E + A / D^b, b halved by repeats,", ("D", "unique"), Filtered, 4
    ),
    "fine_tuning": Form(estimate_fine_tuning, "E + B / (D_l + D^beta)", ("D",), Rectified, 4),
}


def form_named(name: str) -> Form:
    """Raises ValueError for a name that is none."""
    if name not in FORMS:
        raise ValueError(f"there is no form {name!r}\nhint: {nearest(name, FORMS)}")
    return FORMS[name]


def notes_of(fit: Fit) -> list[str]:
    """What to know before the numbers are believed."""
    notes = []
    repeated = int(fit.points.repeated.sum())
    if repeated and fit.form not in ("data_constrained", "filtered"):
        notes.append(
            f"{repeated} runs repeat their tokens, which this form takes for fresh ones: "
            "--form data_constrained"
        )
    errors = np.abs(log_errors(fit.law, fit.points.take(fit.kept)))
    if errors.mean() > POOR:
        notes.append(f"the law misses its own runs by {100 * errors.mean():.1f}% on average")
    if len(fit.points) < 3 * FORMS[fit.form].num_numbers:
        notes.append(f"{len(fit.points)} runs are few for {FORMS[fit.form].num_numbers} numbers")
    return notes
