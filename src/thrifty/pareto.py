"""The Pareto front of memory against time, with quality as a third coordinate.

A way to hold a step is dropped only where another takes no more memory, no more seconds a useful
token, and is worth no less a token. Quality is a prior (``priors.py``): what is small and fast but
worth little (SGD, MeZO) is on the front, but hides nothing that is worth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thrifty.combinations import Combinations
from thrifty.costs.allocator import device_memory
from thrifty.held import PACKING_FILL, Held

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 8
"""Steps of memory that people are shown."""
CLEARLY = 0.98
"""Less than this much of what a smaller one takes."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A way to hold a step that no other beats in everything."""

    held: Held
    micro_batch: int
    memory_bytes: float
    """On the device, of all phases of the job but scoring; gradients accumulate, where they can."""
    seconds_per_useful_token: float
    flops_per_useful_token: float

    @property
    def seconds_per_worth(self) -> float:
        """Seconds of a useful token over what it is worth."""
        return self.seconds_per_useful_token / self.held.quality.mean


def pareto_front(combinations: Combinations, most_allocated: float) -> list[Point]:
    """The front of the combinations whose tensors fit in ``most_allocated`` bytes, the smallest
    first."""
    columns = combinations.columns
    memory, seconds = columns.accumulating, columns.seconds
    fits = np.flatnonzero(memory <= most_allocated)
    found = fits[_not_dominated(memory[fits], seconds[fits], columns.quality[fits].round(6))]
    return [
        _point(*combinations.at(int(at)), float(memory[at]), float(seconds[at])) for at in found
    ]


def _not_dominated(
    memory: NDArray[np.float64], seconds: NDArray[np.float64], quality: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Places of the points that no other beats or equals in all three, by memory. Of equals the
    first stays.

    From the highest quality down, the lower envelope of all that is worth as much is kept: what
    lies on or above it is beaten.
    """
    envelope = np.empty(0, dtype=int)
    front = []
    for worth in sorted(set(quality.tolist()), reverse=True):
        # The envelope comes first, so that in a tie the more worth stays.
        places = np.concatenate([envelope, np.flatnonzero(quality == worth)])
        places = places[np.lexsort((seconds[places], memory[places]))]
        fastest = np.minimum.accumulate(np.concatenate([[np.inf], seconds[places]]))[:-1]
        envelope = places[seconds[places] < fastest]
        front.append(envelope[quality[envelope] == worth])
    found = np.concatenate(front) if front else envelope
    return found[np.lexsort((seconds[found], memory[found]))]


def _point(held: Held, index: int, allocated: float, seconds: float) -> Point:
    micro = held.micro(index)
    return Point(
        held=held,
        micro_batch=held.micro_batches[index],
        memory_bytes=device_memory(allocated, held.block.settings[0].device_kind).device,
        seconds_per_useful_token=seconds,
        flops_per_useful_token=micro.flops / (micro.tokens * PACKING_FILL),
    )


def thinned(front: Sequence[Point], most: int = SHOWN) -> list[Point]:
    """Of equal steps of memory, by its logarithm, the point whose seconds buy most worth, where it
    buys more than all smaller ones; and of all that is worth most a token the fastest."""
    if not front:
        return []
    sizes = np.log([point.memory_bytes for point in front])
    span = float(sizes[-1] - sizes[0]) or 1.0
    best: dict[int, Point] = {}
    for point, size in zip(front, sizes, strict=True):
        step = min(int(most * (size - sizes[0]) / span), most - 1)
        known = best.get(step)
        if known is None or point.seconds_per_worth < known.seconds_per_worth:
            best[step] = point
    shown: list[Point] = []
    for step in sorted(best):
        if not shown or best[step].seconds_per_worth < CLEARLY * shown[-1].seconds_per_worth:
            shown.append(best[step])
    worth = max(point.held.quality.mean for point in front)
    finest = [point for point in front if point.held.quality.mean == worth]
    fastest = min(finest, key=lambda point: point.seconds_per_useful_token)
    if all(point is not fastest for point in shown):
        shown.append(fastest)
    return sorted(shown, key=lambda point: point.memory_bytes)
