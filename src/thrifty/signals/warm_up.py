"""A warm-up with an adapter, as LESS has it (Xia et al. 2024, arXiv:2402.04333), and gradients at
its checkpoints in few dimensions.

    Gamma(z; theta_i) = m' / (sqrt(v') + eps),   m' = (b1 m + (1 - b1) g) / (1 - b1^t),
                                                 v' = (b2 v + (1 - b2) g^2) / (1 - b2^t)

is the direction in which Adam, with the moments m and v that it has at checkpoint i, would move the
weights after a step on z alone. The exact gradient of the adapter is formed a batch at a time,
turned into that direction, sketched and dropped, so that nothing of its size is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Models, Pool, Tokens, Work
from thrifty.costs.flops import train_flops
from thrifty.costs.setting import Adapter, MemorySetting
from thrifty.signals.adapters import adapter_weights
from thrifty.signals.example_gradients import each_batch, gradients_cost
from thrifty.signals.forward import shape_of
from thrifty.signals.proxy_run import proxy_run, proxy_run_cost
from thrifty.signals.sketch import CountSketch
from thrifty.signals.trajectories import drawn_examples

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Of ``torch.optim.AdamW``, which the warm-up trains with."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter after an epoch, each weight as a flat tensor."""

    weights: list[Any]
    first: list[Any]
    second: list[Any]
    """Adam's moments, before their correction."""
    step: int


@dataclass
class WarmUp:
    """A model with its adapter, and what the adapter was after each epoch."""

    model: Any
    shape: Any
    adapter: Adapter
    sketch: CountSketch
    checkpoints: list[Checkpoint] = field(default_factory=list)

    def features(
        self, examples: Sequence[Tokens], number: int, meter: Meter, *, adam: bool, unit: bool
    ) -> NDArray[np.float32]:
        """[n, num_dimensions]: sketches of the examples' gradients at checkpoint ``number``, or of
        Adam's directions; of unit length if asked for. An example without loss has zeros."""
        import torch

        found = np.zeros((len(examples), self.sketch.num_dimensions), dtype=np.float32)
        checkpoint, weights = self.checkpoints[number], adapter_weights(self.model)
        with torch.no_grad():
            for weight, saved in zip(weights, checkpoint.weights, strict=True):
                weight.copy_(saved)

        def flops(rows: int, length: int) -> float:
            return train_flops(self.shape, rows, length, adapter=self.adapter)

        for batch, gradients in each_batch(self.model, weights, examples, meter, flops):
            flat = gradients.flat()
            norms = flat.norm(dim=1, keepdim=True)
            if adam:
                flat = self._adams(flat, checkpoint)
            sketches = self.sketch(flat) * (norms > 0)  # no loss, no direction
            if unit:
                sketches = sketches / sketches.norm(dim=1, keepdim=True).clamp_min(1e-30)
            found[batch] = sketches.float().cpu().numpy()
        return found

    def _adams(self, gradients: Any, checkpoint: Checkpoint) -> Any:
        import torch

        (one, two), step = _BETAS, checkpoint.step + 1
        first, second = torch.cat(checkpoint.first), torch.cat(checkpoint.second)
        mean = gradients.mul(1 - one).add_(first * one).div_(1 - one**step)
        spread = gradients.square().mul_(1 - two).add_(second * two).div_(1 - two**step)
        return mean.div_(spread.sqrt_().add_(_EPSILON))


def warm_up(
    pool: Pool,
    models: Models,
    meter: Meter,
    *,
    max_rows: int,
    epochs: int,
    learning_rate: float,
    rank: int,
    num_dimensions: int,
    seed: int,
) -> WarmUp:
    """Train an adapter on every linear with ``max_rows`` of the pool, drawn at random."""
    adapter = Adapter(rank=rank)
    _, examples = drawn_examples(pool, models, max_rows, seed)
    checkpoints: list[Checkpoint] = []

    def keep(model: Any, optimizer: Any) -> None:
        weights = adapter_weights(model)
        states = [optimizer.state[weight] for weight in weights]
        checkpoints.append(
            Checkpoint(
                [weight.detach().clone() for weight in weights],
                [state["exp_avg"].flatten().clone() for state in states],
                [state["exp_avg_sq"].flatten().clone() for state in states],
                int(states[0]["step"]),
            )
        )

    model = proxy_run(
        models.base(),
        models.shape,
        examples,
        meter,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        adapter=adapter,
        after_epoch=keep,
    )
    elements = sum(weight.numel() for weight in adapter_weights(model))
    sketch = CountSketch(elements, num_dimensions, seed)
    return WarmUp(model, models.shape, adapter, sketch, checkpoints)


def warm_up_cost(work: Work, max_rows: int, epochs: int, rank: int, model: str) -> Cost:
    """Predicted cost of ``warm_up``."""
    stats = work.pool.part(min(1.0, max_rows / max(work.pool.num_examples, 1)))
    return proxy_run_cost(work, stats, epochs, model, Adapter(rank=rank))


def features_cost(work: Work, stats: PoolStats, rank: int, model: str) -> Cost:
    """Predicted cost of ``WarmUp.features`` of one checkpoint over rows like ``stats``."""
    adapter = Adapter(rank=rank)
    elements = adapter.num_parameters(shape_of(work, model))
    return gradients_cost(work, stats, MemorySetting(adapter=adapter), elements, model)
