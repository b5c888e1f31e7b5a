"""The run's objective, measured: dev or test loss over the targets, with paired error bars.

    L = sum_t w_t L_t / sum_t w_t,   L_t = nats a token over the target's rows

The standard error of the change between two evaluations pairs the same rows, which is many times
smaller than that of the loss itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import ranks
from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Rows
from thrifty.costs.shape import ModelShape
from thrifty.signals.forward import Losses, example_losses, losses_flops


class Diverged(RuntimeError):
    """A dev loss is not finite."""


@dataclass(frozen=True)
class Measured:
    """One evaluation over all targets."""

    by_target: Mapping[str, Losses]
    weights: Mapping[str, float]

    @property
    def objective(self) -> float:
        total = sum(self.weights.values())
        return sum(self.weights[t] * m.objective for t, m in self.by_target.items()) / total

    def stderr(self, before: Measured | None = None) -> float:
        """Of the objective, or of its change since ``before``."""
        total = sum(self.weights.values())
        squares = [
            (self.weights[t] / total * m.stderr(before.by_target[t] if before else None)) ** 2
            for t, m in self.by_target.items()
        ]
        return float(np.sqrt(np.sum(squares)))

    def losses(self) -> dict[str, float]:
        return {name: m.objective for name, m in self.by_target.items()}

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {}
        for i, (_, m) in enumerate(sorted(self.by_target.items())):
            arrays[f"nll_{i}"], arrays[f"tokens_{i}"] = m.nll, m.num_tokens
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path, weights: Mapping[str, float]) -> Measured:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                {
                    name: Losses(arrays[f"nll_{i}"], arrays[f"tokens_{i}"])
                    for i, name in enumerate(sorted(weights))
                },
                weights,
            )


def measure(
    model: Any,
    shape: ModelShape,
    rows: Mapping[str, Rows],
    weights: Mapping[str, float],
    meter: Meter,
    max_tokens: int | None = None,
    *,
    together: bool = False,
) -> Measured:
    """Evaluate ``model`` on every target's rows. Raises Diverged where a loss is not finite.

    ``together``: all ranks call this; each measures its share of the batches, ``meter`` is charged
    for those of all, and all have the whole.
    """
    share = (ranks.rank(), ranks.world()) if together else (0, 1)
    found = {
        name: example_losses(model, shape, r.tokens, meter, max_tokens, share)
        for name, r in rows.items()
    }
    if share != (0, 1):
        found = {
            name: Losses(ranks.added(losses.nll), ranks.added(losses.num_tokens))
            for name, losses in found.items()
        }
        others = [(number, share[1]) for number in range(share[1]) if number != share[0]]
        meter.tick(Cost(flops=sum(measure_flops(shape, rows, max_tokens, s) for s in others)))
    return checked(Measured(found, weights))


def checked(found: Measured) -> Measured:
    """Raises Diverged where a loss is not finite."""
    for name, loss in found.losses().items():
        if not np.isfinite(loss):
            raise Diverged(
                f"the loss on {name} is not finite: the model diverged\n"
                "hint: lower training.learning_rate in plan.yaml; the same command then goes on "
                "from the last checkpoint"
            )
    return found


def measure_flops(
    shape: ModelShape,
    rows: Mapping[str, Rows],
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> float:
    """Exactly what ``measure`` takes, or a share of it."""
    return sum(
        losses_flops(shape, [len(t.input_ids) for t in r.tokens], max_tokens, share)
        for r in rows.values()
    )
