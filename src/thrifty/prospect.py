"""What the budget still has for a run, and what its loss is forecast to be: by which options of the
loop are turned into gains and prices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation
from thrifty.core.marginal import Estimate
from thrifty.scaling.curves import forecast


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """Of a run as it is."""

    now_flops: float
    left: Cost
    """That the budget still spends on training steps."""
    resource: str
    """The binding one."""
    loss_at: Callable[[float], float]
    """FLOPs spent by then -> the loss forecast."""
    relative_error: float
    """Of the gain that the forecast promises of training on."""
    unit: str

    @classmethod
    def of(
        cls, history: Sequence[Evaluation], spent: Cost, left: Cost, resource: str, unit: str
    ) -> Prospect | None:
        """By the run's own evaluations; None where they are too few for a forecast."""
        end = forecast(history, spent.flops + left.flops)
        if end is None:
            return None

        def loss_at(flops: float) -> float:
            found = forecast(history, flops)
            assert found is not None
            return found[0]

        gain = abs(history[-1].loss - end[0])
        return cls(
            now_flops=spent.flops,
            left=left,
            resource=resource,
            loss_at=loss_at,
            relative_error=end[1] / max(gain, 1e-9),
            unit=unit,
        )

    def gain(self, multiple: float, error: float) -> Estimate:
        """Of tokens to come that are worth ``multiple`` as much, or that are as many times more."""
        then = self.loss_at(self.now_flops + self.left.flops)
        better = self.loss_at(self.now_flops + multiple * self.left.flops)
        further = self.loss_at(self.now_flops + (multiple + error) * self.left.flops)
        mean = then - better
        stderr = math.hypot(better - further, self.relative_error * mean)
        return Estimate(mean, stderr, self.unit, "prior")

    def price(self, cost: Cost) -> float:
        """Of a unit of the resource: what the last of training brings, as much as ``cost``."""
        amount = cost.of(self.resource) or 0.0
        if amount <= 0:
            return 0.0
        share = min(1.0, amount / max(self.left.of(self.resource) or 0.0, 1e-9))
        shorter = self.loss_at(self.now_flops + (1 - share) * self.left.flops)
        gained = shorter - self.loss_at(self.now_flops + self.left.flops)
        return max(gained, 0.0) / amount
