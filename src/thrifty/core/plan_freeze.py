"""``training.grad_freeze`` in plan.yaml: whether matrices that learn no more are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thrifty.core.plan import Plan


@dataclass(frozen=True, kw_only=True)
class GradFreeze:
    """Stopping matrix by matrix, by the norm of its gradient (GradES, arXiv:2509.01842)."""

    below: float = 0.05
    """A matrix is trained no more once its gradient is less than this share of its largest."""
    after: float = 0.3
    """Share of ``max_steps`` before the first is stopped."""
    smoothing: float = 0.9
    """Weight of the steps before in the norm that is looked at."""


def wrong_freeze(plan: Plan) -> Iterator[str]:
    """What stands against it, but for how a step is held."""
    freeze = plan.training.grad_freeze
    if freeze is None:
        return
    for name in ("below", "after", "smoothing"):
        if not 0 <= getattr(freeze, name) < 1:
            value = getattr(freeze, name)
            yield f"training.grad_freeze.{name} must be in [0, 1), not {value}"
    if plan.training.devices > 1:
        yield "training.grad_freeze uses one device"
    if plan.task == "preference":
        yield "training.grad_freeze: training on preferences trains all to the end"
