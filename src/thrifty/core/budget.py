"""What may be spent and what a step takes.

Five resources are *consumed* and add up: FLOPs, tokens trained on, seconds, joules, dollars. One is
*held*: memory, of which the peak counts. ``Cost.__add__`` knows that difference; nothing else does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from thrifty.core import quantities

if TYPE_CHECKING:
    from collections.abc import Mapping

CONSUMED = ("flops", "tokens", "seconds", "joules", "dollars")
HELD = ("peak_memory_bytes",)
RESOURCES = CONSUMED + HELD


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
            **{name: _sum(getattr(self, name), getattr(other, name)) for name in CONSUMED},
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
        )

    def __mul__(self, times: float) -> Cost:
        """The same step ``times`` over: consumption multiplies, the peak stays."""
        scaled = {name: getattr(self, name) for name in CONSUMED}
        return replace(self, **{k: None if v is None else v * times for k, v in scaled.items()})

    __rmul__ = __mul__

    def of(self, resource: str) -> float | None:
        return getattr(self, resource)

    def to_dict(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in RESOURCES}

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> Cost:
        return cls(**{name: values[name] for name in RESOURCES if name in values})  # pyright: ignore

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
class Budget:
    """Hard limits, each in its base unit; None means no limit.

    ``memory_bytes`` limits the peak of a device (on a CPU: the resident set of the process).
    """

    flops: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    joules: float | None = None
    dollars: float | None = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"the budget's {field.name} must be more than zero and finite, not {value!r}\n"
                    f"hint: leave {field.name} out for no limit"
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
        for name in self.limited:
            used = spent.of(name)
            left[name] = 0.0 if used is None else self.limit(name) - used  # pyright: ignore
        return left

    def exceeded_by(self, total: Cost) -> str | None:
        """The first resource in which ``total`` passes a limit, or None.

        A limited resource whose amount is unknown counts as exceeded: an unknown price cannot be
        held to a limit.
        """
        for name in (*CONSUMED, *HELD):
            limit, amount = self.limit(name), total.of(name)
            if limit is not None and (amount is None or amount > limit * (1 + 1e-12)):
                return name
        return None

    def binding(self, spent: Cost, step: Cost) -> tuple[str | None, float]:
        """Which resource runs out first when ``step`` is repeated, and after how many steps."""
        scarcest, steps = None, math.inf
        for name, left in self.left(spent).items():
            used = step.of(name)
            possible = 0.0 if used is None else (left / used if used > 0 else math.inf)
            if possible < steps:
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
    """Tokens of the longest example."""
    num_loss_tokens: int = 0
    """Tokens that carry loss (answers only, in a prompt/completion pool)."""

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / max(self.num_examples, 1)
