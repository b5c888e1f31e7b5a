"""The price of compute where the size of a model and its tokens are free.

    lambda(C) = |dL*/dC|      of a law's frontier, at the whole budget C

What a FLOP brings elsewhere: to a larger model on more tokens. A run whose own gain a FLOP is
below it is past its best use of compute; along the frontier the two are equal
(``scaling/allocation.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from thrifty.core.budget import Budget, Cost
from thrifty.core.objective import Objective
from thrifty.scaling.allocation import price
from thrifty.scaling.law_file import read_law


def frontier_price(
    objective: Objective, budget: Budget
) -> tuple[Callable[[str, Cost], float], ...]:
    """(resource, what an interval takes) -> nats a unit of it; nothing where the objective names
    no law. Raises ValueError for a law that cannot be asked, or a budget without FLOPs."""
    if not objective.law:
        return ()
    if budget.flops is None:
        raise ValueError(
            "objective.law prices FLOPs, and the budget does not limit them\n"
            "hint: --flops, or leave objective.law out"
        )
    of_a_flop = float(price(read_law(objective.law).law, budget.flops))

    def of(resource: str, interval: Cost) -> float:
        amount = interval.of(resource)
        return of_a_flop * interval.flops / amount if amount else 0.0

    return (of,)
