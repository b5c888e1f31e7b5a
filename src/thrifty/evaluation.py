"""A run's objective as measured: dev or test loss over the targets, with paired error bars.

    L = sum_t w_t L_t / sum_t w_t,   L_t = nats a token over the target's rows
                                     (of a score of answers: 1 - its mean)

The standard error of the change between two evaluations pairs the same rows, which is many times
smaller than that of the loss itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import ranks
from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Rows
from thrifty.costs.flops import forward_flops
from thrifty.costs.shape import ModelShape
from thrifty.signals.forward import Losses, example_losses, losses_flops, num_passes
from thrifty.signals.sharded import idle, is_sharded

_BESIDE = "beside "


class Diverged(RuntimeError):
    """A dev loss is not finite."""


@dataclass(frozen=True)
class Measured:
    """One evaluation over all targets."""

    by_target: Mapping[str, Losses]
    weights: Mapping[str, float]
    beside: Mapping[str, Losses] = field(default_factory=dict)
    """What else was measured at the same time, and is not in the objective (``yardstick.py``)."""

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
            if m.least_change:
                arrays[f"least_{i}"] = np.array(m.least_change)
        for name, m in self.beside.items():
            arrays[f"{_BESIDE}nll {name}"], arrays[f"{_BESIDE}tokens {name}"] = m.nll, m.num_tokens
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path, weights: Mapping[str, float]) -> Measured:
        with np.load(path, allow_pickle=False) as arrays:
            found = {
                name: Losses(
                    arrays[f"nll_{i}"],
                    arrays[f"tokens_{i}"],
                    float(arrays[f"least_{i}"]) if f"least_{i}" in arrays else 0.0,
                )
                for i, name in enumerate(sorted(weights))
            }
            nll = f"{_BESIDE}nll "
            names = [key.removeprefix(nll) for key in arrays if key.startswith(nll)]
            beside = {
                name: Losses(arrays[nll + name], arrays[f"{_BESIDE}tokens {name}"])
                for name in names
            }
        return cls(found, weights, beside)


def losses_of(
    model: Any,
    shape: ModelShape,
    rows: Mapping[str, Rows],
    meter: Meter,
    max_tokens: int | None = None,
    *,
    together: bool = False,
) -> dict[str, Losses]:
    """Of each set of rows under ``model``.

    ``together``: all ranks call this; each measures its share of the batches, ``meter`` is charged
    for those of all, and all have the whole.
    """
    share = share_of(together)
    found = {
        name: example_losses(model, shape, r.tokens, meter, max_tokens, share)
        for name, r in rows.items()
    }
    if share == (0, 1):
        return found
    others = [(number, share[1]) for number in range(share[1]) if number != share[0]]
    meter.tick(Cost(flops=sum(measure_flops(shape, rows, max_tokens, s) for s in others)))
    if is_sharded(model):
        _keep_pace(model, shape, rows, meter, max_tokens)
    return {
        name: Losses(ranks.added(losses.nll), ranks.added(losses.num_tokens))
        for name, losses in found.items()
    }


def _keep_pace(
    model: Any, shape: ModelShape, rows: Mapping[str, Rows], meter: Meter, max_tokens: int | None
) -> None:
    """Idle passes, until all ranks have made as many as the first; charged for all."""
    made = [
        sum(
            num_passes(shape, [len(t.input_ids) for t in some.tokens], max_tokens, (number, of))
            for some in rows.values()
        )
        for of in [ranks.world()]
        for number in range(of)
    ]
    idle(model, made[0] - made[ranks.rank()])
    meter.tick(Cost(flops=forward_flops(shape, 1, 1) * sum(made[0] - each for each in made)))


def share_of(together: bool) -> tuple[int, int]:
    """Which part of the batches is this rank's, of how many: all where it works alone."""
    return (ranks.rank(), ranks.world()) if together else (0, 1)


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
    """Exactly what ``losses_of`` takes, or a share of it."""
    return sum(
        losses_flops(shape, [len(t.input_ids) for t in r.tokens], max_tokens, share)
        for r in rows.values()
    )
