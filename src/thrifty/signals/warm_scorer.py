"""What scorers of gradients along a warm-up share; of those whose score is summed over its
checkpoints, all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Tokens, Work
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter
from thrifty.signals.forward import shape_of
from thrifty.signals.gradient_records import record
from thrifty.signals.gradient_store import GradientStore, model_identity, pool_identity
from thrifty.signals.warm_up import WarmUp, features_cost, warm_up, warm_up_cost

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class WarmedUp(Scorer):
    """Gradients of a LoRA adapter after a warm-up, beside a target's."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    max_warmup_rows: int = 2_000
    """Rows of the pool that the warm-up trains on, drawn at random."""
    epochs: int = 2
    """Of the warm-up; a checkpoint each."""
    learning_rate: float = 1e-3
    rank: int = 8
    layers: int = 0
    """The adapter is on the last so many decoder layers, and the backward ends below them; 0: on
    all."""
    max_target_rows: int = 128
    """Target rows whose gradients are averaged, the first so many."""
    seed: int = 0

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "gradient"
    stand_in: ClassVar[str] = "grad_cosine"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            max_warmup_rows=(1, inf),
            epochs=(1, inf),
            learning_rate=(0, 1),
            rank=(1, inf),
            layers=(0, inf),
            max_target_rows=(1, inf),
            seed=(0, 2**32 - 1),
        )

    def adapter(self, shape: ModelShape) -> Adapter:
        """What the warm-up trains. Raises ValueError for more layers than there are."""
        if self.layers > shape.num_layers:
            raise ValueError(
                f"{shape.model_type} has {shape.num_layers} layers, not {self.layers}\n"
                "hint: ask for fewer, or for 0, which is all"
            )
        last = tuple(range(shape.num_layers))[-self.layers :]
        return Adapter(rank=self.rank, layers=last if self.layers else None)

    def _warm_up_cost(self, work: Work) -> Cost:
        adapter = self.adapter(shape_of(work, self.model))
        return warm_up_cost(work, self.max_warmup_rows, self.epochs, adapter, self.model)

    def _shown_stats(self, work: Work) -> list[PoolStats]:
        """Of the targets' rows that are looked at."""
        return [
            target.part(min(1.0, self.max_target_rows / max(target.num_examples, 1)))
            for target in work.targets.values()
        ]

    def _warm_up(
        self,
        pool: Pool,
        own: Models,
        meter: Meter,
        num_dimensions: int = 0,
        files: Sequence[Path] = (),
    ) -> WarmUp:
        return warm_up(
            pool,
            own,
            meter,
            max_rows=self.max_warmup_rows,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            adapter=self.adapter(own.shape),
            num_dimensions=num_dimensions,
            seed=self.seed,
            files=files,
        )

    def _shown(self, targets: Mapping[str, Rows], own: Models) -> list[Sequence[Tokens]]:
        return [own.tokens(target)[: self.max_target_rows] for target in targets.values()]


@dataclass(frozen=True, kw_only=True)
class WarmScorer(WarmedUp):
    """Inner products of rows' directions with the target's mean gradient, over LoRA checkpoints."""

    dimensions: int = 8192
    store: str = ""
    """Folder in which the warm-up and the rows' gradients are kept for other targets to come."""
    bits: int = 16
    """Of a number of a gradient that is kept: 16, 8 or 1."""

    by_adam: ClassVar[bool]
    """Whether a row counts by Adam's step on it, rather than by its gradient."""
    by_cosine: ClassVar[bool]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, dimensions=(1, inf), bits=(1, 16))
        record(self.dimensions, self.bits)  # says which bits there are

    def cost(self, work: Work) -> Cost:
        """What is in the store is not paid for again; where it is another's, nothing is."""
        total = Cost() if self._is_warm else self._warm_up_cost(work)
        adapter = self.adapter(shape_of(work, self.model))
        for folder in self._folders:
            held = GradientStore(folder, self.dimensions, self.bits).num_rows if self.store else 0
            left = work.pool.part(max(0.0, 1 - held / max(work.pool.num_examples, 1)))
            for stats in (left, *self._shown_stats(work)):
                total += features_cost(work, stats, adapter, self.model)
        return total

    @property
    def _folders(self) -> list[Path]:
        folder = Path(self.store).expanduser()
        return [folder / f"checkpoint-{number}" for number in range(self.epochs)]

    @property
    def _checkpoints(self) -> list[Path]:
        return [folder / "adapter.safetensors" for folder in self._folders if self.store]

    @property
    def _is_warm(self) -> bool:
        """Whether the warm-up lies in the store."""
        return bool(self.store) and all(file.is_file() for file in self._checkpoints)

    def _stores(self, pool: Pool, own: Models) -> list[GradientStore]:
        """One a checkpoint. Raises ValueError where one is of something else."""
        if not self.store:
            return []
        pool_is, num_rows = pool_identity(pool)
        made_of = {
            "model": model_identity(own.base()),
            "pool": pool_is,
            "direction": "Adam's" if self.by_adam else "gradient",
            "seed": self.seed,
            "rank": self.rank,
            "layers": self.layers,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "max_warmup_rows": self.max_warmup_rows,
        }
        stores = [
            GradientStore.open(
                folder, self.dimensions, self.bits, {**made_of, "checkpoint": number}, num_rows
            )
            for number, folder in enumerate(self._folders)
        ]
        if any(store.has_begun for store in stores) and not self._is_warm:
            raise ValueError(
                f"{self.store!r} holds gradients of a warm-up that is no longer there\n"
                "hint: delete it, and all is computed anew"
            )
        return stores

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[WarmUp, Models, list[NDArray[np.float32]]]:
        """The warm-up, its model's tokenizer, and for each checkpoint the targets' mean directions
        [num_targets, num_dimensions]."""
        own = models.other(self.model)
        stores = self._stores(pool, own)
        warm = self._warm_up(pool, own, meter, self.dimensions, self._checkpoints)
        warm.stores = stores
        shown = self._shown(targets, own)
        directions = []
        for number in range(self.epochs):
            each = [
                warm.features(rows, number, meter, adam=False, unit=self.by_cosine)
                for rows in shown
            ]
            directions.append(np.stack([_mean(some) for some in each]))
        return warm, own, directions

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        warm, _, directions = state
        total = np.zeros((len(shard), len(directions[0])), dtype=np.float32)
        for number, towards in enumerate(directions):
            total += warm.products(
                shard, number, towards, meter, adam=self.by_adam, unit=self.by_cosine
            )
        return total / np.float32(len(directions))


def _mean(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the rows that are finite."""
    finite = features[np.isfinite(features).all(axis=1)]
    if not len(finite):
        raise ValueError(
            "no row of the target has a gradient that is finite\n"
            "hint: a lower learning_rate of the warm-up, or training.memory.weights: float32"
        )
    return np.asarray(finite.mean(axis=0, dtype=np.float32))
