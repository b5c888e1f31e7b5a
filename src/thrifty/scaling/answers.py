"""What a law answers, as a program reads it: every number with the interval of its draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from thrifty.scaling import allocation
from thrifty.scaling.allocation import Allocation, Conditions
from thrifty.scaling.asking import knows_parameters, loss_of
from thrifty.scaling.bootstrap import interval
from thrifty.scaling.law_file import Known
from thrifty.scaling.published import with_repeats

FAR = 100.0
"""Times the largest run from which on an answer says how far it reaches."""


def predicted(known: Known, N: float | None, D: float, conditions: Conditions) -> dict[str, Any]:
    """The loss of N parameters after D tokens, with what a FLOP more brings and would bring where
    N and D are free."""
    alone = not knows_parameters(known.law)
    if N is None and not alone:
        raise ValueError("this law asks for parameters too\nhint: --params 7B")
    known, notes = _for_repeats(known, conditions)

    def loss(law: Any) -> Any:
        return loss_of(law, N, D, conditions.unique)

    facts: dict[str, Any] = {
        "law": known.facts,
        "N": None if alone else N,
        "D": D,
        "unique": _finite(conditions.unique),
        "loss": float(loss(known.law)),
        "price": None,
        "intervals": {},
    }
    if known.draws is not None:
        facts["intervals"] = {"D": [D, D], "loss": interval(loss(known.draws))}
    if alone or N is None:
        return {**facts, "notes": notes}
    flops = conditions.flops(N, D)
    best = allocation.best_for_flops(known.law, flops, conditions)
    facts |= {
        "flops": flops,
        "price": float(best.price),
        "slope": float(allocation.own_slope(known.law, N, D, conditions)),
        "best": {"N": float(best.N), "D": float(best.D), "loss": float(best.loss)},
    }
    if known.draws is not None:
        draws = known.draws
        facts["intervals"] |= {
            "N": [N, N],
            "price": interval(allocation.price(draws, flops, conditions)),
            "slope": interval(allocation.own_slope(draws, N, D, conditions)),
        }
    return {**facts, "notes": [*notes, *_how_far(known, N * D)]}


def allocated(
    known: Known, flops: float | None, loss: float | None, conditions: Conditions
) -> dict[str, Any]:
    """The best N and D for ``flops``, or for the least FLOPs that reach ``loss``."""
    known, notes = _for_repeats(known, conditions)
    if flops is not None:
        allocation.check_budget(flops, conditions)

    def answer(law: Any) -> Allocation:
        if flops is not None:
            return allocation.best_for_flops(law, flops, conditions)
        assert loss is not None
        return allocation.least_for_loss(law, loss, conditions)

    found = answer(known.law)
    facts: dict[str, Any] = {
        "law": known.facts,
        "flops": float(found.flops),
        "N": float(found.N),
        "D": float(found.D),
        "loss": float(found.loss),
        "price": float(found.price),
        "unique": _finite(conditions.unique),
        "epochs": float(found.epochs),
        "last_epoch_worth": float(found.last_epoch_worth),
        "served": conditions.served,
        "flops_of": {
            "training": float(conditions.training * found.N * found.D),
            "serving": float(conditions.serving * found.N * conditions.served),
        },
        "intervals": {},
    }
    if known.draws is not None:
        with np.errstate(all="ignore"):  # draws under which a loss is out of reach
            drawn = answer(known.draws)
        names = ("flops", "N", "D", "loss", "price", "epochs", "last_epoch_worth")
        facts["intervals"] = {name: interval(getattr(drawn, name)) for name in names}
    return {**facts, "notes": [*notes, *_how_far(known, facts["N"] * facts["D"])]}


def decisions(known: Known, budgets: list[float]) -> list[dict[str, Any]]:
    """The best use of each of ``budgets``, for the table below a fit."""
    kept = ("flops", "N", "D", "loss", "price", "intervals")
    return [
        {name: facts[name] for name in kept}
        for facts in (allocated(known, flops, None, Conditions()) for flops in budgets)
    ]


def _for_repeats(known: Known, conditions: Conditions) -> tuple[Known, list[str]]:
    """A law that knows what repeats are worth, where there are only so many unique tokens."""
    if not np.isfinite(conditions.unique) or not knows_parameters(known.law):
        return known, []
    law, source = with_repeats(known.law)
    if not source:
        return known, []
    draws = known.draws
    if draws is not None:
        draws = replace(draws, R_D=law.R_D, R_N=law.R_N)
    changed = replace(known, law=law, draws=draws)
    return changed, [f"what repeated tokens are worth is not in this law: taken from {source}"]


def _how_far(known: Known, size: float) -> list[str]:
    if known.largest is None or size < FAR * known.largest:
        return []
    return [
        f"that is {size / known.largest:,.0f} times the training of the largest run that the law "
        "was fitted to; its interval does not know whether the form holds so far"
    ]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
