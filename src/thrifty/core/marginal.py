"""The one rule: every decision is a choice among options by marginal gain per unit of resource.

    rate(o) = (mean_o - z * stderr_o) / cost_o[resource]          for a new option
    rate(o) = (mean_o + z * stderr_o) / cost_o[resource]          for the incumbent

The option with the highest rate wins if its rate is above the price of what remains; otherwise none
does, which halts. A change has to prove itself (lower bound) and what already runs has the benefit
of the doubt (upper bound), so that noise in a measurement neither kills a run nor makes it
oscillate. The rule is that of arXiv:2606.10706: "computation should be halted or reallocated once
marginal performance gains fall below a budget-dependent threshold"; the price is that threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from thrifty.core import quantities
from thrifty.core.budget import RESOURCES, Cost

RULE_VERSION = 1
Source = Literal["prior", "pilot", "history"]


@dataclass(frozen=True)
class Estimate:
    """A gain with its error bar, its unit and where it comes from. More is better."""

    mean: float
    stderr: float
    unit: str
    source: Source

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean) or not self.stderr >= 0:
            raise ValueError(
                f"a gain needs a finite mean and a standard error of at least 0, not {self}\n"
                "hint: an option whose gain is unknown is no option; leave it out"
            )


@dataclass(frozen=True)
class Option:
    """Something that the budget could buy next."""

    name: str
    gain: Estimate
    cost: Cost
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and everything needed to choose again and get the same answer."""

    chosen: str | None
    options: tuple[Option, ...]
    rates: tuple[float, ...]
    resource: str
    price: float
    incumbent: str | None
    z: float
    reason: str
    rule_version: int = RULE_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(
    options: Sequence[Option],
    *,
    resource: str,
    price: float = 0.0,
    incumbent: str | None = None,
    z: float = 1.0,
) -> Choice:
    """Weigh ``options`` by gain per unit of ``resource`` (a field of ``Cost``).

    ``price`` is what a unit of the resource would buy elsewhere, in the gains' unit per unit of the
    resource; zero where there is no alternative, so that only noise or the budget halts. Ties go to
    the incumbent, then to the option named first.

    Raises ValueError where the options' gains are in different units, or where two options share a
    name.
    """
    if resource not in RESOURCES:
        raise ValueError(f"there is no resource {resource!r}\nhint: one of {', '.join(RESOURCES)}")
    if not (price >= 0 and 0 <= z < math.inf):
        raise ValueError(
            f"a choice needs a price and a z of at least 0, not {price} and {z}\n"
            "hint: a price of 0 says that what remains has no other use"
        )
    names = [option.name for option in options]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two options have the same name among {', '.join(sorted(names))}\n"
            "hint: the record of a decision tells options apart by their names"
        )
    units = {option.gain.unit for option in options}
    if len(units) > 1:
        raise ValueError(
            f"gains in {' and '.join(sorted(units))} cannot be compared\n"
            "hint: express every option in the run's objective first"
        )
    bounds = [_bound(option, incumbent, z) for option in options]
    rates = tuple(
        rate(bound, option.cost.of(resource)) for bound, option in zip(bounds, options, strict=True)
    )

    def rank(i: int) -> tuple[float, float, bool, int]:
        of_free = -bounds[i] if rates[i] == math.inf else 0.0  # all free gains have one rate
        return -rates[i], of_free, names[i] != incumbent, i

    best = min(range(len(options)), key=rank, default=None)
    # Exactly at a price of zero a sure zero gain is no reason to spend.
    wins = best is not None and rates[best] > price
    unit = next(iter(units), "")
    return Choice(
        chosen=options[best].name if wins and best is not None else None,
        options=tuple(options),
        rates=rates,
        resource=resource,
        price=price,
        incumbent=incumbent,
        z=z,
        reason=_reason(options, rates, best, wins, resource, price, unit),
    )


def replay(row: Mapping[str, Any]) -> Choice:
    """Choose again from a decision's record (``Choice.to_dict``).

    Raises ValueError where another version of the rule decided.
    """
    if row["rule_version"] != RULE_VERSION:
        raise ValueError(
            f"version {row['rule_version']} of the rule decided, this is {RULE_VERSION}\n"
            "hint: replay it with the thrifty version that made the run"
        )
    options = [
        Option(o["name"], Estimate(**o["gain"]), Cost.from_dict(o["cost"]), o.get("note", ""))
        for o in row["options"]
    ]
    return choose(
        options,
        resource=row["resource"],
        price=row["price"],
        incumbent=row["incumbent"],
        z=row["z"],
    )


def _bound(option: Option, incumbent: str | None, z: float) -> float:
    margin = z * option.gain.stderr if z > 0 else 0.0  # not 0 times infinity
    return option.gain.mean + (margin if option.name == incumbent else -margin)


def rate(bound: float, cost: float | None) -> float:
    """Of a bound on a gain and a cost in the resource that counts. Decisions that are many, small
    and alone compare it with the price by themselves, with the expected gain as the bound."""
    if cost is None or not math.isfinite(cost):
        return -math.inf  # an unknown cost cannot be justified
    if cost <= 0:
        return math.inf if bound > 0 else (0.0 if bound == 0 else -math.inf)
    return bound / cost


def _reason(
    options: Sequence[Option],
    rates: Sequence[float],
    best: int | None,
    wins: bool,
    resource: str,
    price: float,
    unit: str,
) -> str:
    if best is None:
        return "no option is left"
    size, per = quantities.PER[resource]
    rate = f"{quantities.short(rates[best] * size)} {unit} a {per}"
    if rates[best] == math.inf:
        rate = f"{quantities.short(options[best].gain.mean)} {unit} for nothing"
    against = f"the price of {quantities.short(price * size)}"
    if not wins:
        return f"best is {options[best].name} at {rate}, not above {against}"
    second = max((r for i, r in enumerate(rates) if i != best), default=None)
    rest = "" if second is None else f"; next best {quantities.short(second * size)}"
    return f"{options[best].name} at {rate}, above {against}{rest}"
