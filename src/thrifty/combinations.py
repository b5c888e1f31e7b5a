"""Every way to hold a training step: all combinations of memory techniques, micro-batches and ways
to lay out sequences, priced at once.

A combination takes one technique of each kind (``core.contracts.MEMORY_KINDS``); one that refuses
another is left out with its reason. What is left is priced in blocks, a program (what is trained,
in which dtype, how recomputed) at a time: memory of all micro-batches under all optimizers is one
array, so that tens of thousands of combinations take less than a second.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.budget import Cost
from thrifty.core.contracts import MEMORY_KINDS, MemoryTechnique, Worth
from thrifty.core.resolve import all_names, method_class, name_of
from thrifty.costs.flops import step_coefficients
from thrifty.costs.hardware import Device
from thrifty.costs.memory import peaks
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import seconds_by_optimizer
from thrifty.priors import Priors, load_priors

if TYPE_CHECKING:
    from numpy.typing import NDArray

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_ACCUMULATED = 10**6


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
    accumulating: NDArray[np.float64]
    """The same while gradients accumulate over micro-batches; infinite where they cannot."""
    seconds: NDArray[np.float64]  # [num_states, num_batches], of a micro-batch with its update
    flops: NDArray[np.float64]  # [num_batches]


@dataclass(frozen=True)
class Held:
    """One way to hold a step, at every micro-batch."""

    block: Block
    state: int
    priors: Priors

    @property
    def techniques(self) -> tuple[MemoryTechnique, ...]:
        return (*self.block.techniques, self.block.states[self.state])

    @cached_property
    def technique_names(self) -> dict[str, str]:
        return dict(zip(MEMORY_KINDS, map(name_of, self.techniques), strict=True))

    @property
    def name(self) -> str:
        return " ".join(self.technique_names.values())

    @cached_property
    def quality(self) -> Worth:
        return quality_of(self.techniques, self.priors)

    @cached_property
    def runs(self) -> bool:
        """Whether a run can train with it; otherwise it is priced alone. A run's packs have their
        mask, its adapters are float32, and it plans one device."""
        setting = self.block.settings[self.state]
        alike = setting.masked and setting.num_devices == 1
        alike = alike and (setting.adapter is None or setting.adapter_dtype == "float32")
        return alike and all(technique.runs for technique in self.techniques)

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
    def most_accumulated(self) -> int:
        return 1 if self.block.settings[self.state].in_backward else MOST_ACCUMULATED

    def setting(self, index: int) -> MemorySetting:
        return replace(self.block.settings[self.state], micro_batch=self.micro_batches[index])

    def peak(self, index: int, accumulating: bool) -> float:
        of = self.block.accumulating if accumulating else self.block.peaks
        return float(of[self.state, index])

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
        setting = self.block.settings[self.state]
        return Cost(
            flops=float(self.block.flops[index]) * setting.num_devices,
            seconds=float(self.block.seconds[self.state, index]),
            tokens=float(self.micro_batches[index] * setting.sequence * setting.num_devices),
        )


@dataclass(frozen=True)
class Combinations:
    """All that was priced, and what could not be combined."""

    blocks: tuple[Block, ...]
    priors: Priors
    refused: Mapping[str, int]
    """Technique and reason -> how many combinations of techniques it ruled out."""

    @property
    def num_combinations(self) -> int:
        return sum(block.peaks.size for block in self.blocks)

    def num_fitting(self, limit: float) -> int:
        """Combinations whose tensors take no more than ``limit`` bytes."""
        return int(sum((block.peaks <= limit).sum() for block in self.blocks))

    @cached_property
    def held(self) -> list[Held]:
        return [
            Held(block, state, self.priors)
            for block in self.blocks
            for state in range(len(block.states))
        ]


def quality_of(techniques: tuple[MemoryTechnique, ...], priors: Priors) -> Worth:
    """Of a token trained on under these, in tokens under the reference: the product of the priors
    of what departs from it."""
    trains_weights = name_of(techniques[0]) == "full"
    worths = [priors.of(technique, trained=trains_weights) for technique in techniques]
    mean = math.prod(worth.mean for worth in worths)
    relative = math.hypot(*(worth.stderr / worth.mean for worth in worths))
    sources = [worth.source for worth in worths if worth.mean != 1.0]
    return Worth(mean, mean * relative, "; ".join(sources) or "reference")


def variants(kind: str, names: Sequence[str] | None = None) -> list[MemoryTechnique]:
    """The techniques of a kind, or those named, each in the forms that its class offers."""
    found: list[MemoryTechnique] = []
    for name in all_names(kind) if names is None else names:
        cls: Any = method_class(kind, name)
        found += cls.variants()
    return found


def price_all(
    shape: ModelShape,
    device: Device,
    *,
    sequence: int,
    layouts: Sequence[Mapping[str, Any]] = ({"masked": True},),
    wanted: Mapping[str, Sequence[MemoryTechnique]] | None = None,
    micro_batches: Sequence[int] = MICRO_BATCHES,
    runs_only: bool = False,
) -> Combinations:
    """Price every combination on a device.

    ``layouts``: fields of the setting that say how sequences are laid out, and on how many devices.
    ``wanted``: kind ->
    techniques to take; a kind that is missing takes all. ``runs_only``: those alone that a run can
    train with.
    """
    kinds = [
        [
            technique
            for technique in (wanted or {}).get(kind) or variants(kind)
            if technique.runs or not runs_only
        ]
        for kind in MEMORY_KINDS
    ]
    refused: Counter[str] = Counter()
    blocks: list[Block] = []
    for fields in layouts:
        start = MemorySetting(sequence=sequence, device_kind=device.kind, **fields)
        for techniques, setting in _settings(start, kinds[:-1], refused):
            states = _states(setting, kinds[-1], refused)
            if states:
                blocks.append(_block(shape, device, techniques, states, tuple(micro_batches)))
    return Combinations(tuple(blocks), load_priors(), dict(refused))


def _settings(
    start: MemorySetting, kinds: Sequence[Sequence[MemoryTechnique]], refused: Counter[str]
) -> list[tuple[tuple[MemoryTechnique, ...], MemorySetting]]:
    """Each set of techniques that goes together, and the setting that it makes."""
    level: list[tuple[tuple[MemoryTechnique, ...], MemorySetting]] = [((), start)]
    for techniques in kinds:
        grown = []
        for (so_far, setting), technique in itertools.product(level, techniques):
            reason = technique.refuses(setting)
            if reason is None:
                grown.append(((*so_far, technique), technique.rewrite(setting)))
            else:
                refused[f"{name_of(technique)}: {reason}"] += 1
        level = grown
    return level


def _states(
    setting: MemorySetting, techniques: Sequence[MemoryTechnique], refused: Counter[str]
) -> list[tuple[MemoryTechnique, MemorySetting]]:
    found = []
    for technique in techniques:
        reason = technique.refuses(setting)
        if reason is None:
            found.append((technique, technique.rewrite(setting)))
        else:
            refused[f"{name_of(technique)}: {reason}"] += 1
    return found


def _block(
    shape: ModelShape,
    device: Device,
    techniques: tuple[MemoryTechnique, ...],
    states: Sequence[tuple[MemoryTechnique, MemorySetting]],
    micro_batches: tuple[int, ...],
) -> Block:
    settings = tuple(setting for _, setting in states)
    linear, attention = step_coefficients(shape, settings[0])
    sequence = settings[0].sequence
    tokens = np.array(micro_batches, dtype=float) * sequence
    alone, accumulating = peaks(shape, settings, micro_batches)
    return Block(
        techniques=techniques,
        states=tuple(technique for technique, _ in states),
        settings=settings,
        micro_batches=micro_batches,
        peaks=alone,
        accumulating=accumulating,
        seconds=seconds_by_optimizer(shape, settings, device, micro_batches),
        flops=tokens * (linear + attention * sequence),
    )
