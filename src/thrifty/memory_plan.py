"""A run's memory plan: its techniques put together, as they are priced and as they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thrifty.core.contracts import (
    MEMORY_KINDS,
    ActivationMemory,
    LossMemory,
    MemoryTechnique,
    OptimizerStates,
    Trainable,
    WeightStorage,
)
from thrifty.core.plan import MemoryPlan
from thrifty.core.resolve import name_of, resolve, spec_of
from thrifty.costs.setting import Adapter, MemorySetting, read_in
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """One of each kind."""

    trained: Trainable
    weights: WeightStorage
    activations: ActivationMemory
    loss: LossMemory
    states: OptimizerStates

    @classmethod
    def of(cls, memory: MemoryPlan) -> Techniques:
        return cls(**{kind: resolve(kind, getattr(memory, kind)) for kind in MEMORY_KINDS})

    @property
    def in_order(self) -> tuple[MemoryTechnique, ...]:
        return tuple(getattr(self, kind) for kind in MEMORY_KINDS)

    def setting(self, start: MemorySetting) -> MemorySetting:
        """``start`` rewritten by all. Raises ValueError where one refuses another."""
        setting = start
        for kind, technique in zip(MEMORY_KINDS, self.in_order, strict=True):
            if (reason := technique.refuses(setting)) is not None:
                raise ValueError(
                    f"training.memory.{kind}: {name_of(technique)} does not go here: {reason}\n"
                    f"hint: another technique for training.memory.{kind}, or for what it refuses"
                )
            setting = technique.rewrite(setting)
        return setting

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        """Why one of them does not go with a model of this shape there; None where all do."""
        for kind, technique in zip(MEMORY_KINDS, self.in_order, strict=True):
            if reason := technique.refuses_model(shape, device_kind):
                return f"{kind}: {name_of(technique)} does not go with this model: {reason}"
        return None

    def build(self, base: Path, shape: ModelShape, device: str, seed: int, shards: int = 1) -> Any:
        """The base model as it is trained; cut over ``shards`` ranks, which ask for it together."""
        model = self.weights_of(base, device, shards)
        model = self.trained.prepare(model, shape, seed)
        self.loss.hold(model)
        self.activations.hold(model)
        return model

    def weights_of(self, base: Path, device: str, shards: int = 1) -> Any:
        """The base model as its weights are held."""
        if shards == 1:
            return self.weights.load(base, device)
        return self.weights.load_sharded(base, device, shards)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape, seed: int) -> Any:
        """Of what is trained; see ``OptimizerStates.optimizer``."""
        own = self.trained.optimizer(groups, shape, seed)
        return self.states.optimizer(groups, shape) if own is None else own


def memory_plan_of(techniques: Sequence[MemoryTechnique]) -> MemoryPlan:
    """One of each kind, in the order of the kinds, as plan.yaml has them."""
    return MemoryPlan(**dict(zip(MEMORY_KINDS, map(spec_of, techniques), strict=True)))


def dtype_of(memory: MemoryPlan) -> Literal["float32", "bfloat16"]:
    """In which the base model is read by what looks at it besides training."""
    return read_in(resolve("weights", memory.weights).rewrite(MemorySetting(adapter=Adapter())))


def trained_name(memory: MemoryPlan) -> str:
    """What is trained: ``full``, ``lora``, ..."""
    return name_of(resolve("trained", memory.trained))
