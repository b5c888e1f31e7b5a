"""Bytes held at the peak of a training step, per phase and per term.

A step has three phases, and its peak is the largest of them, never their sum:

    loss       weights + optimizer + activations of all layers + logits in float32 (about 12 V T)
    backward   weights + optimizer + gradients so far + activations not yet consumed + temporaries
    optimizer  weights + optimizer + gradients + what the optimizer allocates

or, where it has no backward, two:

    estimate      weights + what lives beside them in a layer, or the logits + a moved weight
    perturbation  weights + logits + the noise of the largest

What autograd keeps of each layer, and which buffers live beside it, is read off the layer's
operations (``layer.py``, ``liveness.py``), so that recomputation, adapters, masks, dropout and
dtypes need no rules of their own here. For T tokens, a bf16 Llama layer without a mask comes to the
known T (20 h + 4 kv + 8 f + 4 a + 8). All of it is evaluated for many micro-batches at once: a
search asks for thousands (``peaks``), a plan for one (``account``), of the same formulas.

Counted are bytes that PyTorch allocates. Not counted: what the allocator reserves on top, files in
the page cache, data loader workers (``costs/allocator.py`` adds what a device needs beside). On a
CPU, glibc's default malloc holds 12-24% of fragmentation (none with MALLOC_MMAP_THRESHOLD_=65536).

Limits: no autocast (the model itself has ``dtype``); eager PyTorch, not compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from thrifty.costs.blocks import Block, worst_turns
from thrifty.costs.held import (
    checkpoint_bytes,
    kv_cache_bytes,
    largest_tensor,
    num_trained,
    state_bytes_of,
    step_bytes,
    update_bytes_of,
    weight_bytes,
)
from thrifty.costs.liveness import pieces
from thrifty.costs.operations import Adapter
from thrifty.costs.passes import shared_bytes
from thrifty.costs.phases import BATCH_BYTES, TERMS, Step
from thrifty.costs.setting import (
    ADAMW,
    MemorySetting,
    States,
    Storage,
    at_turn,
    parts_of,
    setup_of,
    takes_turns,
)
from thrifty.costs.shape import ModelShape
from thrifty.costs.trained import trained, trained_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.float64]

__all__ = [
    "ADAMW",
    "TERMS",
    "Adapter",
    "MemoryAccount",
    "MemorySetting",
    "States",
    "Storage",
    "account",
    "checkpoint_bytes",
    "forward_account",
    "kv_cache_bytes",
    "largest_tensor",
    "num_trained",
    "peaks",
    "saved_bytes",
    "setup_of",
    "weight_bytes",
    "worst_turn",
]

RUNTIME_BYTES = {"cpu": 640 * 2**20, "cuda": 520 * 2**20}
"""Calibrated, not derived. cpu: resident set of Python with all
that a run imports (470 MiB) and what scoring and loading leave behind in the allocator.
cuda: a process's context and cuBLAS workspace, which nvidia-smi shows beyond torch's own bytes."""


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """Bytes by phase and term."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def phase_bytes(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak_memory_bytes(self) -> float:
        return self.phase_bytes(self.peak_phase)

    @property
    def by_term(self) -> dict[str, float]:
        """The terms at the peak."""
        return self.phases[self.peak_phase]


def account(shape: ModelShape, setting: MemorySetting) -> MemoryAccount:
    """Bytes of one training step in steady state: optimizer states exist from its start. Of blocks
    that take turns, of the turn that holds most."""
    setting = worst_turn(shape, setting)
    phases: dict[str, dict[str, float]] = {}
    for part in parts_of(setting):  # which have no phase in common
        phases |= Step(shape, part, (part.micro_batch,)).terms()
    return MemoryAccount(phases=phases)


def worst_turn(shape: ModelShape, setting: MemorySetting) -> MemorySetting:
    """The turn that holds most, where blocks take turns; else ``setting`` itself."""
    blocks = takes_turns(setting)
    if blocks is None:
        return setting
    turns = [at_turn(setting, block) for block in worst_turns(shape, blocks)]
    return max(turns, key=lambda turn: account(shape, turn).peak_memory_bytes)


def peaks(
    shape: ModelShape, settings: Sequence[MemorySetting], micro_batches: Sequence[int]
) -> tuple[Bytes, Bytes]:
    """The peak of ``account`` for each setting and micro-batch, [num_settings, num_batches], of one
    micro-batch a step, and of several whose gradients accumulate (infinite where they cannot).

    The settings may differ in their optimizer alone, which changes none of the passes.
    """
    if settings[0].short:
        parts = zip(*map(parts_of, settings), strict=True)
        each = [peaks(shape, part, micro_batches)[0] for part in parts]
        most = np.maximum.reduce(each)
        return most, np.full_like(most, np.inf)
    if shape.attention == "math" and 1 in micro_batches and len(micro_batches) > 1:
        # A single row is a program of its own, as some kernels broadcast it without a copy.
        rows = np.array(micro_batches)
        one, more = (
            peaks(shape, settings, tuple(rows[those].tolist())) for those in (rows == 1, rows > 1)
        )
        where = np.flatnonzero(rows == 1)
        return np.insert(more[0], where, one[0], axis=1), np.insert(more[1], where, one[1], axis=1)
    blocks = takes_turns(settings[0])
    turns = worst_turns(shape, blocks) if blocks else (None,)
    found = [_peaks_at(shape, settings, turn, tuple(micro_batches)) for turn in turns]
    single, accumulated = (np.maximum.reduce(most) for most in zip(*found, strict=True))
    return single, accumulated


def _peaks_at(
    shape: ModelShape,
    settings: Sequence[MemorySetting],
    turn: Block | None,
    batches: tuple[int, ...],
) -> tuple[Bytes, Bytes]:
    """``peaks`` at one turn of blocks, or where none are taken."""
    found = trained_at(shape, turn) if turn else trained(shape, settings[0])
    passes: dict[float, tuple[Bytes, Bytes]] = {}
    always, states, updates, within = [], [], [], []  # an entry a setting
    for setting in settings:
        key = step_bytes(setting) if setting.in_backward else -1.0
        if key not in passes:
            now = at_turn(setting, turn) if turn else setting
            step = Step(shape, now, batches)
            accumulating = np.full(len(batches), np.inf)
            if not setting.in_backward:
                accumulating = _of_passes(shape, now, batches, 2)
            passes[key] = _of_passes(shape, now, batches, 1), accumulating
            held = step.held - step.states["optimizer_states"]
        always.append(held)
        states.append(0.0 if setting.states_offloaded else state_bytes_of(shape, found, setting))
        updates.append(
            step.last().bytes if setting.zeroth_order else [sum(update_bytes_of(found, setting))]
        )
        within.append(passes[key])
    own = np.array(always) + np.array(states)[:, None] / settings[0].trained_shards
    update, most = np.array(updates), np.array(within)
    return own + np.maximum(most[:, 0], update), own + np.maximum(most[:, 1], update)


def _of_passes(
    shape: ModelShape, setting: MemorySetting, batches: tuple[int, ...], accumulation_steps: int
) -> Bytes:
    """The most of all phases but the update, beside what holds always. The same in however few bits
    the weights lie, and whatever the optimizer unless it updates within."""
    alike = setting.changed(
        gradient_accumulation_steps=accumulation_steps,
        storage=setting.storage and _FEW_BITS,
        states=setting.states if setting.in_backward else ADAMW,
        states_offloaded=False,
    )
    return _of_equal_passes(shape, alike, batches)


_FEW_BITS = Storage(name="few bits", bits=4.0)


@lru_cache(maxsize=512)
def _of_equal_passes(shape: ModelShape, setting: MemorySetting, batches: tuple[int, ...]) -> Bytes:
    *most, _ = [instant.bytes for instant in Step(shape, setting, batches).instants().values()]
    return np.maximum.reduce(most)


# -- passes without gradients ---------------------------------------------------------------------


def forward_account(
    shape: ModelShape,
    batch: int,
    sequence: int,
    dtype: str,
    *,
    masked: bool = True,
    loss: bool = True,
    device_kind: str = "cpu",
) -> MemoryAccount:
    """Bytes of a forward pass without gradients, as in evaluation and scoring; ``loss``: logits and
    their float32 loss at every position."""
    setting = MemorySetting(
        micro_batch=batch, sequence=sequence, dtype=dtype, masked=masked, device_kind=device_kind
    )
    setup = setup_of(shape, setting, backward=False)
    _, *body, last = pieces(shape, setup)
    weights = float(shape.num_parameters * setup.itemsize)
    held = BATCH_BYTES * setting.tokens
    points = {"layers": body[-1].forward} | ({"loss": last.forward} if loss else {})
    phases = {}
    tokens = np.array([float(setting.tokens)])
    for phase, instants in points.items():
        _, at = instants.highest(tokens, float(sequence))
        most = instants.points[at[0]].beside.at(setting.tokens, sequence)
        if phase == "layers":  # the layer's input, and what the embedding put out: a variable
            most += 2.0 * last.input.at(setting.tokens, sequence)
        masks = shared_bytes(shape, setup, held=phase == "layers").at(setting.tokens, sequence)
        phases[phase] = dict.fromkeys(TERMS, 0.0) | {
            "weights": weights,
            "activations" if phase == "layers" else "logits": most,
            "temporaries": held + masks,
        }
    return MemoryAccount(phases=phases)


def saved_bytes(
    shape: ModelShape,
    setting: MemorySetting,
    micro_batches: tuple[int, ...],
    *,
    head: bool = False,
) -> Bytes:
    """What autograd keeps at the end of the forward, at each micro-batch, with or without what the
    head keeps."""
    step = Step(shape, setting, micro_batches)
    return step.kept + (step.passes.bytes(step.passes.last.saved) if head else 0.0)
