"""What each technique of a candidate is there for: to make it fit, or to get more from a FLOP.

Feasible and efficient are two questions. A technique makes it fit where nothing fits with the
reference of its kind in its place, at any micro-batch. It is better per FLOP (or per second, where
time binds) where a useful token costs less with it than with the reference, for what the token is
worth. One may be both, or neither: then it is as good as the reference, or was taken for speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.combinations import Combinations, Neighbours, variants
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.resolve import name_of
from thrifty.held import REFERENCE, Held
from thrifty.pricing import Candidate
from thrifty.request import Request

CLEARLY = 0.995
"""Less than this much of the reference's cost."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Names of techniques."""

    makes_it_fit: tuple[str, ...]
    better_per_flop: tuple[str, ...]
    makes_the_batch_fit: tuple[str, ...]
    """Of those that do not make it fit: without them this micro-batch would not."""
    frees_bytes: Mapping[str, float]
    """Of the others: what they free of the peak under the reference."""


class Purposes:
    """Answers for the candidates of one search; ways to hold a step that were priced for one serve
    the others."""

    def __init__(self, combinations: Combinations, request: Request) -> None:
        self._limit = request.most_allocated
        self._references = {kind: variants(kind, [REFERENCE[kind]])[0] for kind in MEMORY_KINDS}
        self._neighbours = Neighbours(
            combinations=combinations,
            shape=request.shape,
            device=request.device,
            generated_context=request.generated_context,
        )

    def of(self, candidate: Candidate) -> Answers:
        held = candidate.held
        resource = "flops" if candidate.binding == "flops" else "seconds"
        fit, batch, better, frees = [], [], [], dict[str, float]()
        place = held.micro_batches.index(candidate.setting.micro_batch)
        for kind, technique in zip(MEMORY_KINDS, held.techniques, strict=True):
            if name_of(technique) == REFERENCE[kind]:
                continue
            without = self._without(held, kind)
            if without is None:
                continue
            own, other = _fitting(held, self._limit), _fitting(without, self._limit)
            if not other:
                fit.append(name_of(technique))
                own = other = [place]
            elif place not in other:
                batch.append(name_of(technique))
            else:
                frees[name_of(technique)] = without.peak(place, False) - held.peak(place, False)
            if _cost(held, own, resource) < CLEARLY * _cost(without, other, resource):
                better.append(name_of(technique))
        return Answers(
            makes_it_fit=tuple(fit),
            better_per_flop=tuple(better),
            makes_the_batch_fit=tuple(batch),
            frees_bytes=frees,
        )

    def _without(self, held: Held, kind: str) -> Held | None:
        """With the reference of a kind in place of its technique, and of what then refuses; None
        where the reference itself does."""
        setting, techniques = held.start, list(held.techniques)
        for place, (each, technique) in enumerate(zip(MEMORY_KINDS, techniques, strict=True)):
            reference = self._references[each]
            taken = reference if each == kind or technique.refuses(setting) else technique
            if taken.refuses(setting) is not None:
                return None
            techniques[place], setting = taken, taken.rewrite(setting)
        return self._neighbours.of(held, techniques)


def _fitting(held: Held, limit: float) -> list[int]:
    """Numbers of the micro-batches that fit."""
    return [int(index) for index in np.flatnonzero(held.block.peaks[held.state] <= limit)]


def _cost(held: Held, indices: Sequence[int], resource: str) -> float:
    """The least of a token, over what it is worth."""
    costs = [held.micro(index) for index in indices]
    spent = [cost.flops if resource == "flops" else cost.seconds for cost in costs]
    least = min(amount / cost.tokens for amount, cost in zip(spent, costs, strict=True))
    return least / held.quality.mean
