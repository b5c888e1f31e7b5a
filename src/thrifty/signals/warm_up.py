"""A warm-up with an adapter, as LESS has it (Xia et al. 2024, arXiv:2402.04333), and gradients at
its checkpoints in few dimensions.

    Gamma(z; theta_i) = m' / (sqrt(v') + eps),   m' = (b1 m + (1 - b1) g) / (1 - b1^t),
                                                 v' = (b2 v + (1 - b2) g^2) / (1 - b2^t)

is the direction in which Adam, with the moments m and v that it has at checkpoint i, would move the
weights after a step on z alone. The exact gradient of the adapter is formed a batch at a time,
turned into that direction, sketched and dropped, so that nothing of its size is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core import sums
from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Models, Pool, Rows, Tokens, Work
from thrifty.costs.flops import train_flops
from thrifty.costs.setting import Adapter, MemorySetting
from thrifty.signals.adapters import adapter_weights
from thrifty.signals.beside import NOTHING, Beside
from thrifty.signals.example_gradients import BatchGradients, each_batch
from thrifty.signals.forward import shape_of
from thrifty.signals.gradient_costs import gradients_cost
from thrifty.signals.gradient_store import GradientStore
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

    def save(self, file: Path) -> None:
        """As safetensors, whole or not at all, its hash beside it."""
        from safetensors.torch import save_file

        parts = {"weights": self.weights, "first": self.first, "second": self.second}
        tensors = {
            f"{part}.{place}": each.contiguous()
            for part, some in parts.items()
            for place, each in enumerate(some)
        }
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(tensors, aside, metadata={"step": str(self.step)})
        sums.keep(aside, file)

    @classmethod
    def load(cls, file: Path, device: Any) -> Checkpoint:
        """Raises ValueError where the file is not as it was written."""
        from safetensors import safe_open

        sums.check(file, "delete the whole store; the warm-up and the gradients are made anew")
        with safe_open(file, "pt", device=str(device)) as kept:
            places = range(len(kept.keys()) // 3)
            weights, first, second = (
                [kept.get_tensor(f"{part}.{place}") for place in places]
                for part in ("weights", "first", "second")
            )
            return cls(weights, first, second, int(kept.metadata()["step"]))


@dataclass
class WarmUp:
    """A model with its adapter, and what the adapter was after each epoch.

    Another process is given the checkpoints alone, and loads the model for itself.
    """

    models: Models
    adapter: Adapter
    sketch: CountSketch
    checkpoints: list[Checkpoint]
    stores: list[GradientStore] = field(default_factory=list)
    """Where the features of rows are kept, one a checkpoint; none where they are not."""

    def __getstate__(self) -> dict[str, Any]:
        sketch = self.sketch
        hashless = CountSketch(sketch.num_elements, sketch.num_dimensions, sketch.seed)
        known = {name: value for name, value in vars(self).items() if name != "model"}
        return {**known, "sketch": hashless}

    @cached_property
    def model(self) -> Any:
        """On the base model's own weights."""
        nothing: Any = None  # is trained on, nor ticked
        return proxy_run(
            self.models.base(),
            self.models.shape,
            [],
            nothing,
            epochs=0,
            learning_rate=0.0,
            seed=self.sketch.seed,
            adapter=self.adapter,
        )

    @property
    def weights(self) -> list[Any]:
        """Of the adapter."""
        return adapter_weights(self.model)

    def gradients(
        self,
        examples: Sequence[Tokens],
        number: int,
        meter: Meter,
        beside: Beside = NOTHING,
        known: NDArray[np.bool_] | None = None,
    ) -> Iterator[tuple[list[int], BatchGradients]]:
        """Of the adapter at checkpoint ``number``: places in ``examples`` and their gradients, a
        batch at a time. ``beside``: what is made of them, to be ticked too; ``known``: as of
        ``each_batch``."""
        import torch

        weights = self.weights
        with torch.no_grad():
            for weight, saved in zip(weights, self.checkpoints[number].weights, strict=True):
                weight.copy_(saved)

        def flops(rows: int, length: int) -> float:
            own = train_flops(self.models.shape, rows, length, adapter=self.adapter)
            return own + beside.flops(rows, length)

        return each_batch(self.model, weights, examples, meter, flops, known)

    def features(
        self, examples: Sequence[Tokens], number: int, meter: Meter, *, adam: bool, unit: bool
    ) -> NDArray[np.float32]:
        """[n, num_dimensions]: sketches of the examples' gradients at checkpoint ``number``, or of
        Adam's directions; of unit length if asked for. An example without loss has zeros, one whose
        gradient is not finite NaN."""
        found = np.zeros((len(examples), self.sketch.num_dimensions), dtype=np.float32)
        for batch, some in self._each(examples, number, meter, adam=adam, unit=unit):
            found[batch] = some
        return found

    def _each(
        self,
        examples: Sequence[Tokens],
        number: int,
        meter: Meter,
        *,
        adam: bool,
        unit: bool,
        known: NDArray[np.bool_] | None = None,
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Places in ``examples`` and their features, a batch at a time."""
        import torch

        for batch, gradients in self.gradients(examples, number, meter, known=known):
            flat = gradients.flat()
            norms = flat.norm(dim=1, keepdim=True)
            if adam:
                flat = self._adams(flat, self.checkpoints[number])
            sketches = self.sketch(flat) * (norms > 0)  # no loss, no direction
            if unit:
                sketches = sketches / sketches.norm(dim=1, keepdim=True).clamp_min(1e-30)
            finite = sketches.isfinite().all(1, keepdim=True)
            yield batch, sketches.where(finite, torch.nan).float().cpu().numpy()

    def products(
        self,
        shard: Rows,
        number: int,
        directions: NDArray[np.float32],
        meter: Meter,
        *,
        adam: bool,
        unit: bool,
    ) -> NDArray[np.float32]:
        """[n, m]: of rows' ``features`` with m directions, by way of the store where there is one:
        what it holds is not computed again, what it lacks kept a batch at a time."""
        if not self.stores:
            tokens = self.models.tokens(shard)
            return self.features(tokens, number, meter, adam=adam, unit=unit) @ directions.T
        store = self.stores[number]
        if not store.holds(shard):
            tokens, writing = self.models.tokens(shard), store.writing(shard)
            for batch, some in self._each(
                tokens, number, meter, adam=adam, unit=False, known=writing.there
            ):
                writing.add(batch, some)
            writing.finish()
        return store.products(shard, directions, cosine=unit)

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
    adapter: Adapter,
    num_dimensions: int,
    seed: int,
    files: Sequence[Path] = (),
) -> WarmUp:
    """Train an adapter with ``max_rows`` of the pool, drawn at random.

    ``num_dimensions``: of its features; 0 where none are asked for. ``files``: where its
    checkpoints are, if they all are, or where to leave them.
    """
    if files and all(file.is_file() for file in files):
        device = next(models.base().parameters()).device
        kept = [Checkpoint.load(file, device) for file in files]
        return WarmUp(models, adapter, _sketch(kept, num_dimensions, seed), kept)
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

    proxy_run(
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
    for checkpoint, file in zip(checkpoints, files, strict=False):
        checkpoint.save(file)
    return WarmUp(models, adapter, _sketch(checkpoints, num_dimensions, seed), checkpoints)


def _sketch(checkpoints: Sequence[Checkpoint], num_dimensions: int, seed: int) -> CountSketch:
    elements = sum(weight.numel() for weight in checkpoints[0].weights)
    return CountSketch(elements, num_dimensions, seed)


def warm_up_cost(work: Work, max_rows: int, epochs: int, adapter: Adapter, model: str) -> Cost:
    """Predicted cost of ``warm_up``."""
    stats = work.pool.part(min(1.0, max_rows / max(work.pool.num_examples, 1)))
    return proxy_run_cost(work, stats, epochs, model, adapter)


def features_cost(
    work: Work, stats: PoolStats, adapter: Adapter, model: str, beside: Beside = NOTHING
) -> Cost:
    """Predicted cost of ``WarmUp.features``, or of ``WarmUp.gradients`` and what is made of them,
    of one checkpoint over rows like ``stats``."""
    elements = adapter.num_parameters(shape_of(work, model))
    cost = gradients_cost(work, stats, MemorySetting(adapter=adapter), elements, model)
    return cost + beside.cost(work, stats)
