"""What passes over examples' gradients take beside their forward and backward, in FLOPs: ticked and
predicted from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Work
from thrifty.costs.time import LARGE_EFFICIENCY
from thrifty.signals.gradient_costs import padded_tokens

_SLOWER = 10.0
"""Of decompositions beside large products; measured on a CPU at 1,024: 5 a solution, 12 an
eigendecomposition."""


@dataclass(frozen=True)
class Beside:
    """FLOPs beside those that ``costs/flops.py`` counts; negative for what it counts and is not
    done."""

    per_token: float = 0.0
    """Padding included."""
    per_example: float = 0.0

    def flops(self, rows: int, length: int) -> float:
        """Of a batch of ``rows`` padded to ``length``."""
        return rows * (length * self.per_token + self.per_example)

    def cost(self, work: Work, stats: PoolStats) -> Cost:
        """Predicted, over rows like ``stats``."""
        tokens = self.per_token * padded_tokens(work, stats)
        return products_cost(work, tokens + self.per_example * stats.num_examples)


NOTHING = Beside()


def products_cost(work: Work, flops: float) -> Cost:
    """Of large matrix products."""
    rate = LARGE_EFFICIENCY * work.device.flops_per_second[work.dtype]
    return Cost(flops=flops, seconds=flops / rate)


def decompositions_cost(work: Work, flops: float) -> Cost:
    """Of eigenvectors and solutions of linear systems, in float64."""
    cost = products_cost(work, flops)
    return replace(cost, seconds=_SLOWER * cost.seconds)
