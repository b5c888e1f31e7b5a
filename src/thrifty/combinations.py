"""Every way to hold a training step: all combinations of memory techniques, micro-batches and ways
to lay out sequences, priced at once.

A combination takes one technique of each kind (``core.contracts.MEMORY_KINDS``); one that refuses
another is left out with its reason. What is left is priced in blocks, a program (what is trained,
in which dtype, how recomputed) at a time: memory of all micro-batches under all optimizers is one
array, so that tens of thousands of combinations take less than a second.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.contracts import MEMORY_KINDS, MemoryTechnique, Worth
from thrifty.core.resolve import all_names, method_class, name_of
from thrifty.costs.flops import fixed_flops, step_coefficients
from thrifty.costs.hardware import Device
from thrifty.costs.job import job_peaks
from thrifty.costs.setting import MemorySetting, parts_of
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import seconds_by_optimizer
from thrifty.held import Block, Held, quality_of
from thrifty.priors import Priors, load_priors

if TYPE_CHECKING:
    from numpy.typing import NDArray

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


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

    def fits(self, limit: float) -> bool:
        """Whether any takes no more than ``limit`` bytes."""
        return any(bool((block.peaks <= limit).any()) for block in self.blocks)

    def num_fitting(self, limit: float, scoring: Callable[[MemorySetting], float]) -> int:
        """Combinations whose tensors take no more than ``limit`` bytes, those of ``scoring`` under
        a setting included."""
        return int(
            sum(
                (block.peaks <= limit).sum()
                for block in self.blocks
                if scoring(block.settings[0]) <= limit
            )
        )

    @cached_property
    def held(self) -> list[Held]:
        """In the order of the columns: those of a block follow each other."""
        qualities: dict[tuple[int, ...], Worth] = {}  # of the same techniques under every layout
        found = []
        for block in self.blocks:
            for state, last in enumerate(block.states):
                key = tuple(map(id, (*block.techniques, last)))
                if key not in qualities:
                    qualities[key] = quality_of((*block.techniques, last), self.priors)
                found.append(Held(block, state, qualities[key]))
        return found

    @cached_property
    def columns(self) -> Columns:
        held, blocks = self.held, self.blocks
        size = len(blocks[0].micro_batches)  # of every block

        def each(values: Sequence[float]) -> NDArray[np.float64]:
            return np.repeat(np.array(values, dtype=float), size)

        return Columns(
            alone=np.concatenate([block.peaks.ravel() for block in blocks]),
            accumulating=np.concatenate([block.held_bytes.ravel() for block in blocks]),
            seconds=np.concatenate(
                [(block.seconds / block.useful_tokens).ravel() for block in blocks]
            ),
            quality=each([one.quality.mean for one in held]),
            num_devices=each([one.num_devices for one in held]),
        )

    def at(self, place: int) -> tuple[Held, int]:
        """The way to hold a step, and the number of its micro-batch, at a place of the columns."""
        number, index = divmod(place, len(self.blocks[0].micro_batches))
        return self.held[number], index

    @cached_property
    def _by_techniques(self) -> dict[tuple[tuple[MemoryTechnique, ...], bool, int], int]:
        """-> the block, and the number of its first way to hold a step."""
        found, first = {}, 0
        for block in self.blocks:
            layout = block.settings[0]
            found[block.techniques, layout.masked, layout.num_devices] = first
            first += len(block.states)
        return found

    def find(self, like: Held, techniques: Sequence[MemoryTechnique]) -> Held | None:
        """Techniques under the layout of ``like``; None where they were not priced."""
        *others, last = techniques
        first = self._by_techniques.get((tuple(others), like.masked, like.num_devices))
        if first is None:
            return None
        states = self.held[first].block.states
        return self.held[first + states.index(last)] if last in states else None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """All combinations, an entry each: [num_combinations]."""

    alone: NDArray[np.float64]
    """Bytes at the peak of a job whose steps have one micro-batch."""
    accumulating: NDArray[np.float64]
    """The same where they have several, if they can."""
    seconds: NDArray[np.float64]
    """Of a useful token."""
    quality: NDArray[np.float64]
    num_devices: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Other techniques under the layout of a way to hold a step, priced by the search or now."""

    combinations: Combinations
    shape: ModelShape
    device: Device
    generated_context: int = 0
    _priced: dict[tuple[Any, ...], Held | None] = field(default_factory=dict)

    def of(self, held: Held, techniques: Sequence[MemoryTechnique]) -> Held | None:
        """None where one technique refuses another."""
        key = (*techniques, held.masked, held.num_devices)
        if key not in self._priced:
            known = self.combinations.find(held, techniques)
            self._priced[key] = known or self._price(held, techniques)
        return self._priced[key]

    def _price(self, held: Held, techniques: Sequence[MemoryTechnique]) -> Held | None:
        setting = held.start
        for technique in techniques:
            if technique.refuses(setting) is not None:
                return None
            setting = technique.rewrite(setting)
        *others, last = techniques
        block = _block(
            self.shape,
            self.device,
            tuple(others),
            [(last, setting)],
            held.micro_batches,
            self.generated_context,
        )
        return Held(block, 0, quality_of(tuple(techniques), self.combinations.priors))


def variants(kind: str, names: Sequence[str] | None = None) -> list[MemoryTechnique]:
    """The techniques of a kind that a search tries, or those named, each in the forms that its
    class offers."""
    classes: list[Any] = [method_class(kind, name) for name in names or all_names(kind)]
    return [form for cls in classes if names or cls.searched for form in cls.variants()]


def missing_packages(techniques: Sequence[MemoryTechnique]) -> str:
    """A package that all of them take and that is not installed; empty where one can do."""
    missing = [_missing(technique.needs) for technique in techniques]
    return missing[0] if missing and all(missing) else ""


@lru_cache
def _missing(packages: tuple[str, ...]) -> str:
    return next((name for name in packages if find_spec(name) is None), "")


def price_all(
    shape: ModelShape,
    device: Device,
    *,
    sequence: int,
    layouts: Sequence[Mapping[str, Any]] = ({"masked": True},),
    wanted: Mapping[str, Sequence[MemoryTechnique]] | None = None,
    micro_batches: Sequence[int] = MICRO_BATCHES,
    runs_only: bool = False,
    accumulated: int = 1,
    generated_context: int = 0,
) -> Combinations:
    """Price every combination on a device.

    ``layouts``: fields of the setting that say how sequences are laid out, and on how many devices.
    ``wanted``: kind -> techniques to take; a kind that is missing takes all. ``runs_only``: those
    alone that a run can train with. ``accumulated``: micro-batches that a step must be able to add
    up. ``generated_context``: tokens that an evaluation holds in its cache.
    """
    kinds = [
        [
            technique
            for technique in (wanted or {}).get(kind) or variants(kind)
            if not runs_only or (technique.runs and not missing_packages([technique]))
        ]
        for kind in MEMORY_KINDS
    ]
    refused: Counter[str] = Counter()
    kinds = [_holding(techniques, shape, device.kind, refused) for techniques in kinds]
    blocks: list[Block] = []
    for fields in layouts:
        start = MemorySetting(sequence=sequence, device_kind=device.kind, **fields)
        usable = _cut(kinds, refused) if runs_only and start.num_devices > 1 else kinds
        for techniques, setting in _settings(start, usable[:-1], refused):
            states = _states(setting, usable[-1], accumulated, refused)
            if states:
                block = _block(
                    shape, device, techniques, states, tuple(micro_batches), generated_context
                )
                blocks.append(block)
    return Combinations(tuple(blocks), load_priors(), dict(refused))


def _holding(
    techniques: Sequence[MemoryTechnique],
    shape: ModelShape,
    device_kind: str,
    refused: Counter[str],
) -> list[MemoryTechnique]:
    """Those that go with a model of this shape there."""
    found = []
    for technique in techniques:
        if (reason := technique.refuses_model(shape, device_kind)) is None:
            found.append(technique)
        else:
            refused[f"{name_of(technique)}: {reason}"] += 1
    return found


def _cut(
    kinds: Sequence[Sequence[MemoryTechnique]], refused: Counter[str]
) -> list[list[MemoryTechnique]]:
    """Those that a run can train with where weights are cut over its devices."""
    for technique in itertools.chain(*kinds):
        if not technique.shards:
            refused[f"{name_of(technique)}: cannot be cut over devices in a run"] += 1
    return [[one for one in techniques if one.shards] for techniques in kinds]


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
    setting: MemorySetting,
    techniques: Sequence[MemoryTechnique],
    accumulated: int,
    refused: Counter[str],
) -> list[tuple[MemoryTechnique, MemorySetting]]:
    found, as_asked = [], setting.changed(gradient_accumulation_steps=accumulated)
    for technique in techniques:
        reason = technique.refuses(as_asked)
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
    generated_context: int,
) -> Block:
    settings = tuple(setting for _, setting in states)
    rows, flops = np.array(micro_batches, dtype=float), np.zeros(len(micro_batches))
    for part in parts_of(settings[0]):
        linear, attention = step_coefficients(shape, part)
        flops += rows * part.sequence * (linear + attention * part.sequence)
        flops += fixed_flops(shape, part)
    alone, accumulating, resident = job_peaks(
        shape, settings, micro_batches, generated_context=generated_context
    )
    return Block(
        techniques=techniques,
        states=tuple(technique for technique, _ in states),
        settings=settings,
        micro_batches=micro_batches,
        peaks=alone,
        resident=resident,
        accumulating=accumulating,
        seconds=seconds_by_optimizer(shape, settings, device, micro_batches),
        flops=flops,
    )
