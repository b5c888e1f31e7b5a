"""A way to hold a step: what it takes at every micro-batch, what a token under it is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from thrifty.core.budget import Cost
from thrifty.core.contracts import MEMORY_KINDS, MemoryTechnique, Worth
from thrifty.core.resolve import name_of
from thrifty.costs.setting import MemorySetting
from thrifty.priors import Priors

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_ACCUMULATED = 10**6
PACKING_FILL = 0.96
"""Share of a packed batch that is tokens, not padding, under best-fit decreasing."""
REFERENCE = {
    "trained": "full",
    "weights": "float32",
    "activations": "keep",
    "loss": "whole",
    "states": "adamw",
}
"""Of each kind, what the others are measured against."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Combinations that differ in their optimizer and their micro-batch alone."""

    techniques: tuple[MemoryTechnique, ...]
    """One of each kind but the last."""
    states: tuple[MemoryTechnique, ...]
    settings: tuple[MemorySetting, ...]
    """An optimizer, at micro-batch 1."""
    micro_batches: tuple[int, ...]
    peaks: NDArray[np.float64]  # [num_states, num_batches]
    """Of all phases of the job but scoring (``costs/job.py``)."""
    accumulating: NDArray[np.float64]
    """The same while gradients accumulate over micro-batches; infinite where they cannot."""
    resident: NDArray[np.float64]  # [num_states]
    """Held between steps."""
    seconds: NDArray[np.float64]  # [num_states, num_batches], of a micro-batch with its update
    flops: NDArray[np.float64]  # [num_batches]

    @property
    def held_bytes(self) -> NDArray[np.float64]:
        """Peaks while gradients accumulate, where they can: [num_states, num_batches]."""
        return np.where(np.isfinite(self.accumulating), self.accumulating, self.peaks)

    @property
    def useful_tokens(self) -> NDArray[np.float64]:
        """Of a micro-batch on every device, those that are no padding: [num_batches]."""
        setting = self.settings[0]
        rows = np.array(self.micro_batches) * setting.num_ranks
        return rows * float(setting.row_tokens) * PACKING_FILL


@dataclass(frozen=True)
class Held:
    """One way to hold a step, at every micro-batch."""

    block: Block
    state: int
    quality: Worth

    @property
    def techniques(self) -> tuple[MemoryTechnique, ...]:
        return (*self.block.techniques, self.block.states[self.state])

    @cached_property
    def technique_names(self) -> dict[str, str]:
        return dict(zip(MEMORY_KINDS, map(name_of, self.techniques), strict=True))

    @property
    def name(self) -> str:
        return " ".join(self.technique_names.values())

    def describe(self, batch: str) -> str:
        """For people: its techniques, what is the reference left out, and how it is laid out."""
        setting, said = self.block.settings[self.state], ("trained", "weights")
        shown = [
            name
            for kind, name in self.technique_names.items()
            if kind in said or name != REFERENCE[kind]
        ]
        if setting.adapter is not None and setting.adapter_dtype != "float32":
            shown.append("bf16 adapters")
        if not setting.masked:
            shown.append("flash")
        laid = "sharded over" if self.num_devices > 1 else "on"
        many = [f"{laid} {self.num_ranks} devices"] if self.num_ranks > 1 else []
        return " ".join((*shown, batch, *many))

    @cached_property
    def runs(self) -> bool:
        """Whether a run can train with it; otherwise it is priced alone. A run's packs have their
        mask."""
        setting = self.block.settings[self.state]
        return setting.masked and all(
            technique.runs and (technique.shards or setting.num_devices == 1)
            for technique in self.techniques
        )

    @property
    def micro_batches(self) -> tuple[int, ...]:
        return self.block.micro_batches

    @property
    def masked(self) -> bool:
        return self.block.settings[self.state].masked

    @property
    def num_devices(self) -> int:
        return self.block.settings[self.state].num_devices

    @property
    def num_ranks(self) -> int:
        """Devices that work on a step, sharding or not."""
        return self.block.settings[self.state].num_ranks

    @property
    def most_accumulated(self) -> int:
        return 1 if self.block.settings[self.state].in_backward else MOST_ACCUMULATED

    @property
    def start(self) -> MemorySetting:
        """The setting that its techniques rewrite."""
        own = self.block.settings[self.state]
        return MemorySetting(
            sequence=own.sequence,
            device_kind=own.device_kind,
            masked=own.masked,
            num_devices=own.num_devices,
            replicas=own.replicas,
            reference=own.reference,
        )

    def setting(self, index: int) -> MemorySetting:
        return self.block.settings[self.state].changed(micro_batch=self.micro_batches[index])

    def peak(self, index: int, accumulating: bool) -> float:
        of = self.block.accumulating if accumulating else self.block.peaks
        return float(of[self.state, index])

    @property
    def resident(self) -> float:
        """Bytes held between steps."""
        return float(self.block.resident[self.state])

    @cached_property
    def seconds_a_row(self) -> NDArray[np.float64]:
        """Of each micro-batch."""
        return self.block.seconds[self.state] / np.array(self.micro_batches)

    def fastest_first(self) -> list[int]:
        """Micro-batches by time a row; of those within a percent of each other the smaller."""
        places = np.round(np.log(self.seconds_a_row) / 0.01)
        return [int(index) for index in np.lexsort((np.array(self.micro_batches), places))]

    def micro(self, index: int) -> Cost:
        """Of a micro-batch on every device at once, its update included."""
        row_tokens = self.block.settings[self.state].row_tokens
        return Cost(
            flops=float(self.block.flops[index]) * self.num_ranks,
            seconds=float(self.block.seconds[self.state, index]),
            tokens=float(self.micro_batches[index] * row_tokens * self.num_ranks),
        )


def quality_of(techniques: tuple[MemoryTechnique, ...], priors: Priors) -> Worth:
    """Of a token trained on under these, in tokens under the reference: the product of the priors
    of what departs from it."""
    worths = worths_of(techniques, priors)
    mean = math.prod(worth.mean for worth in worths)
    relative = math.hypot(*(worth.stderr / worth.mean for worth in worths))
    sources = [worth.source for worth in worths if worth.mean != 1.0]
    return Worth(mean, mean * relative, "; ".join(sources) or "reference")


def worths_of(techniques: tuple[MemoryTechnique, ...], priors: Priors) -> list[Worth]:
    """Of each, what is trained first among them."""
    setting = techniques[0].rewrite(MemorySetting())
    trains_weights = setting.adapter is None and not setting.zeroth_order
    return [priors.of(technique, trained=trains_weights) for technique in techniques]
