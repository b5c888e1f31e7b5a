"""What must not get worse than the base model: targets with a floor, and the guard's rows.

    worse = loss now - loss of the base, on the same rows;   broken  <=>  worse > limit

A checkpoint that breaks one is not kept, however good it is elsewhere; where all do, the base model
is. What counts is the number measured: its standard error (paired by row) says how sure it is, and
whether going on is hopeless.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from thrifty.core.plan import Plan
from thrifty.evaluation import Measured
from thrifty.yardstick import GUARD

IN_A_ROW = 3
Z = 1.645


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of one floor at one evaluation; in the objective's unit, the guard in nats a token."""

    name: str
    """The target's; of the guard ``guard``."""
    kind: Literal["target", "guard"]
    limit: float
    worse: float
    """Than the base; negative where it is better."""
    stderr: float
    unit: str

    @property
    def broken(self) -> bool:
        return self.worse > self.limit

    @property
    def surely(self) -> bool:
        """Whether it is broken beyond noise."""
        return self.worse - Z * self.stderr > self.limit

    def __str__(self) -> str:
        return (
            f"{self.name} is worse than the base by {self.worse:.4f} ± {self.stderr:.4f} "
            f"{self.unit}, at most {self.limit:g} allowed"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "broken": self.broken}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Standing:
        return cls(**{name: value for name, value in values.items() if name != "broken"})


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Those of a run."""

    by_target: Mapping[str, float]
    unit: str
    guard: float | None = None
    guard_unit: str = "nats/token"

    @classmethod
    def of(cls, plan: Plan) -> Floors:
        guard = None if plan.guard is None else plan.guard.max_worse
        return cls(by_target=plan.floors, unit=plan.objective.unit, guard=guard)

    def __bool__(self) -> bool:
        return bool(self.by_target) or self.guard is not None

    def standings(self, now: Measured, base: Measured) -> list[Standing]:
        return list(self._each(now, base))

    def _each(self, now: Measured, base: Measured) -> Iterator[Standing]:
        for name, limit in self.by_target.items():
            after, before = now.by_target[name], base.by_target[name]
            yield Standing(
                name=name,
                kind="target",
                limit=limit,
                worse=after.objective - before.objective,
                stderr=after.stderr(before),
                unit=self.unit,
            )
        if self.guard is not None:
            after, before = now.beside[GUARD], base.beside[GUARD]
            yield Standing(
                name=GUARD,
                kind="guard",
                limit=self.guard,
                worse=after.objective - before.objective,
                stderr=after.stderr(before),
                unit=self.guard_unit,
            )


def hopeless(history: Sequence[Sequence[Standing]], to_come: float) -> str | None:
    """Why there is no use in training on: one floor surely broken at so many evaluations in a row,
    and still so after those ``to_come`` at the pace of these; None where there may be. ``history``:
    of every evaluation, in order."""
    last = history[-IN_A_ROW:]
    if len(last) < IN_A_ROW:
        return None
    for standing in last[-1]:
        which = standing.kind, standing.name
        same = [next((s for s in each if (s.kind, s.name) == which), None) for each in last]
        worse = [s.worse for s in same if s is not None and s.surely]
        if len(worse) < IN_A_ROW:
            continue
        pace = max((worse[0] - worse[-1]) / (IN_A_ROW - 1), 0.0)
        ahead = standing.worse - Z * standing.stderr - pace * to_come
        if ahead > standing.limit:
            return (
                f"{standing}; so it was at {IN_A_ROW} evaluations in a row, and at their pace "
                "would be at the end"
            )
    return None
