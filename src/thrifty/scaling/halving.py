"""Successive halving: many candidates a little, the better ones more (Karnin et al. 2013;
arXiv:1502.07943).

Every rung spends the same: on its candidates alike, so that each of the ``1 / eta`` that remain has
``eta`` times as much on the next. Noise is looked at: what a rung cannot tell apart is settled by
the order in which the candidates are named, cheapest first, and no spending goes to tell apart
what differs by less than matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Measured(Protocol):
    """How good a candidate turned out, more is better: an ``Estimate``, say."""

    @property
    def mean(self) -> float: ...

    @property
    def stderr(self) -> float: ...


@dataclass(frozen=True)
class Rung:
    """One round: how many candidates are in it, and what each is given on top of what it had."""

    num_candidates: int
    budget: float


def rungs(num_candidates: int, total: float, eta: float = 2.0) -> tuple[Rung, ...]:
    """The rounds after which one candidate is left; together they spend ``total`` and never more.

    A single candidate needs none. Raises ValueError for no candidates, a total below 0, an eta of
    at most 1.
    """
    if num_candidates < 1 or not (math.isfinite(total) and total >= 0) or not eta > 1:
        raise ValueError(
            f"no halving of {num_candidates} candidates with {total:g} by {eta:g}\n"
            "hint: at least one candidate, a finite total of at least 0, an eta above 1"
        )
    sizes = []
    while num_candidates > 1:
        sizes.append(num_candidates)
        num_candidates = min(math.ceil(num_candidates / eta), num_candidates - 1)
    # Rounded down: the sum of what the rungs spend must not pass the total by a last bit.
    each = total / max(len(sizes), 1) * (1 - 1e-12)
    return tuple(Rung(size, each / size) for size in sizes)


def survivors(
    measured: Sequence[Measured], keep: int, z: float = 1.0, indifferent: float = 0.0
) -> tuple[int, ...]:
    """Places of at most ``keep`` candidates that go on, ascending: those named first cost least.

    The leader, whose mean is highest, goes on; the places beside it are filled one at a time by the
    first-named of those that are within ``z`` standard errors of the best not yet taken. Of the
    last place the leader has no right: it falls to the first-named of those tied with it. Left out,
    though there be room: who is surely worse than the leader, and who surely differs from somebody
    named earlier that goes on by less than ``indifferent``.
    """
    if keep < 1 or not measured:
        raise ValueError(
            f"cannot keep {keep} of {len(measured)} candidates\nhint: at least one of at least one"
        )
    leader = max(range(len(measured)), key=lambda i: (measured[i].mean, -i))
    left = [i for i in range(len(measured)) if _tied(measured[i], measured[leader], z)]
    taken = []
    if keep > 1:
        taken.append(leader)
        left.remove(leader)
    while left and len(taken) < keep:
        best = max(left, key=lambda i: (measured[i].mean, -i))
        first = min(i for i in left if _tied(measured[i], measured[best], z))
        taken.append(first)
        left.remove(first)
    taken.sort()
    found: list[int] = []
    for i in taken:
        if not any(_alike(measured[i], measured[j], z, indifferent) for j in found):
            found.append(i)
    return tuple(found)


def _noise(a: Measured, b: Measured) -> float:
    return math.hypot(a.stderr, b.stderr)


def _tied(a: Measured, b: Measured, z: float) -> bool:
    return abs(a.mean - b.mean) <= z * _noise(a, b)


def _alike(a: Measured, b: Measured, z: float, indifferent: float) -> bool:
    return abs(a.mean - b.mean) + z * _noise(a, b) < indifferent
