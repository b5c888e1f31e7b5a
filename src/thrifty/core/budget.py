"""What may be spent, what a step takes, and what a second costs.

Five resources are *consumed* and add up: FLOPs, tokens trained on, seconds, joules, dollars. One is
*held*: memory, of which the peak counts. ``Cost.__add__`` knows that difference; nothing else does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from thrifty.core import quantities

if TYPE_CHECKING:
    from collections.abc import Mapping

CONSUMED = ("flops", "tokens", "seconds", "joules", "dollars")
HELD = ("peak_memory_bytes",)
RESOURCES = CONSUMED + HELD
PRICED = ("joules", "dollars")
"""What follows from the seconds and their rates."""
_MOST_A_SECOND = {"dollars_per_second": 1e4, "watts": math.inf}
"""More is a slip; thirty years of it would not fit the ledger's integers of micro-dollars."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An amount of every resource. ``joules`` and ``dollars`` are None where the price is unknown:
    unknown is not zero, and unknown plus anything stays unknown."""

    flops: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    joules: float | None = 0.0
    dollars: float | None = 0.0
    peak_memory_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            joules=_sum(self.joules, other.joules),
            dollars=_sum(self.dollars, other.dollars),
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
        )

    def __mul__(self, times: float) -> Cost:
        """The same step ``times`` over: consumption multiplies, the peak stays."""
        return Cost(
            flops=self.flops * times,
            tokens=self.tokens * times,
            seconds=self.seconds * times,
            joules=None if self.joules is None else self.joules * times,
            dollars=None if self.dollars is None else self.dollars * times,
            peak_memory_bytes=self.peak_memory_bytes,
        )

    __rmul__ = __mul__

    def without(self, part: Cost) -> Cost:
        """The rest of it; the peak stays. Unknown where one of the two is."""
        rest: dict[str, float | None] = {"peak_memory_bytes": self.peak_memory_bytes}
        for name in CONSUMED:
            whole, some = self.of(name), part.of(name)
            rest[name] = None if whole is None or some is None else max(whole - some, 0.0)
        return Cost.from_dict(rest)

    def of(self, resource: str) -> float | None:
        return getattr(self, resource)

    def to_dict(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in RESOURCES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cost:
        return cls(**{name: values[name] for name in RESOURCES if name in values})

    def __str__(self) -> str:
        parts = [
            quantities.FORMATS[name](value)
            for name in RESOURCES
            if (value := self.of(name)) is not None and value > 0
        ]
        return ", ".join(parts) or "nothing"


def _sum(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left + right


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a second of a run's devices costs; None is unknown."""

    dollars_per_second: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), _MOST_A_SECOND[field.name]
            if value is not None and not 0 <= value < most:
                raise ValueError(
                    f"{field.name} must be at least zero and less than {most:,.0f}, not {value!r}\n"
                    "hint: None where it is not known"
                )

    @classmethod
    def hourly(cls, dollars: float | None, watts: float | None = None) -> Rates:
        return cls(dollars_per_second=None if dollars is None else dollars / 3600, watts=watts)

    def of(self, cost: Cost) -> Cost:
        """``cost`` with joules and dollars for its seconds (where it has none of its own)."""
        joules, dollars = cost.joules, cost.dollars
        if joules == 0.0:
            joules = None if self.watts is None else cost.seconds * self.watts
        if dollars == 0.0:
            rate = self.dollars_per_second
            dollars = None if rate is None else cost.seconds * rate
        return replace(cost, joules=joules, dollars=dollars)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Hard limits, each in its base unit; None means no limit.

    ``memory_bytes`` limits the peak of a device (on a CPU: the resident set of the process).
    """

    flops: quantities.Flops | None = None
    tokens: quantities.Tokens | None = None
    seconds: quantities.Seconds | None = None
    joules: float | None = None
    dollars: quantities.Dollars | None = None
    memory_bytes: quantities.Bytes | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):
                raise ValueError(
                    f"the budget's {field.name} must be a number, more than zero and finite, not "
                    f"{value!r}\nhint: leave {field.name} out for no limit"
                )

    def limit(self, resource: str) -> float | None:
        return self.memory_bytes if resource in HELD else getattr(self, resource)

    @property
    def limited(self) -> tuple[str, ...]:
        """The consumed resources that have a limit."""
        return tuple(name for name in CONSUMED if getattr(self, name) is not None)

    def left(self, spent: Cost) -> dict[str, float]:
        """What each limited resource has left; an unknown amount spent leaves nothing."""
        left = {}
        for name in CONSUMED:
            limit, used = self.limit(name), spent.of(name)
            if limit is not None:
                left[name] = 0.0 if used is None else limit - used
        return left

    def exceeded_by(self, total: Cost) -> str | None:
        """The first resource in which ``total`` passes a limit, or None.

        A limited resource whose amount is unknown (None or NaN) counts as exceeded: it cannot be
        held to a limit. Sums of floats may be off by rounding, not by more than 1e-12 of the limit.
        """
        for name in RESOURCES:
            limit, amount = self.limit(name), total.of(name)
            if limit is not None and not (amount is not None and amount <= limit * (1 + 1e-12)):
                return name
        return None

    def binding(self, spent: Cost, step: Cost) -> tuple[str | None, float]:
        """Which resource runs out first when ``step`` is repeated, and after how many steps."""
        scarcest, steps = None, math.inf
        for name, left in self.left(spent).items():
            used = step.of(name)
            if used == 0:
                continue
            possible = left / used if used is not None and used > 0 else 0.0
            if scarcest is None or possible < steps:
                scarcest, steps = name, possible
        return scarcest, max(steps, 0.0)

    def to_dict(self) -> dict[str, float | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        parts = [
            quantities.FORMATS[name](value)
            for name in RESOURCES
            if (value := self.limit(name)) is not None
        ]
        return ", ".join(parts) or "no limit"


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """What pricing needs to know about a set of rows, without the rows."""

    num_examples: int
    num_tokens: int
    max_tokens: int
    """Tokens of the longest sequence: of an example, or of a side of a pair."""
    num_loss_tokens: int = 0
    """Tokens that carry loss (answers only, in a prompt/completion pool)."""
    num_squared_tokens: int = 0
    """Sum over sequences of their tokens squared, which attention is paid by; 0 where unknown."""
    num_padded_tokens: int = 0
    """Tokens with the shorter side of each pair as long as its other one; 0 where unknown."""

    def part(self, share: float) -> PoolStats:
        """Of that share of the rows, drawn evenly."""
        sums = {name: value for name, value in asdict(self).items() if name.startswith("num_")}
        return replace(self, **{name: math.ceil(value * share) for name, value in sums.items()})

    def in_tokens(self, ratio: float) -> PoolStats:
        """Of the same rows, split into so many times the tokens."""
        if ratio == 1.0:
            return self
        return replace(
            self,
            num_tokens=round(self.num_tokens * ratio),
            max_tokens=math.ceil(self.max_tokens * ratio),
            num_loss_tokens=round(self.num_loss_tokens * ratio),
            num_squared_tokens=round(self.num_squared_tokens * ratio**2),
            num_padded_tokens=round(self.num_padded_tokens * ratio),
        )

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / max(self.num_examples, 1)

    @property
    def mean_squared_tokens(self) -> float:
        """Of all examples of one length where their squares are unknown."""
        mean = self.num_squared_tokens / max(self.num_examples, 1)
        return max(mean, self.mean_tokens**2)
