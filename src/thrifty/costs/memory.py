"""Bytes held at the peak of a training step, per phase and per term.

A step has three phases, and its peak is the largest of them, never their sum:

    loss       weights + optimizer + activations of all layers + logits in float32 (about 12 V T)
    backward   weights + optimizer + gradients so far + activations not yet consumed + temporaries
    optimizer  weights + optimizer + gradients + what the optimizer allocates

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thrifty.costs.held import (
    checkpoint_bytes,
    kv_cache_bytes,
    largest_tensor,
    num_trained,
    state_bytes,
    step_bytes,
    update_bytes,
    weight_bytes,
)
from thrifty.costs.liveness import Instants, Point, pieces
from thrifty.costs.operations import Adapter
from thrifty.costs.passes import passes_of, shared_bytes
from thrifty.costs.setting import ADAMW, MemorySetting, States, Storage, setup_of
from thrifty.costs.shape import ModelShape
from thrifty.costs.trained import trained

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
]

TERMS = (
    "weights",
    "adapter",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "temporaries",
)

RUNTIME_BYTES = {"cpu": 640 * 2**20, "cuda": 520 * 2**20}
"""Calibrated, not derived. cpu: resident set of Python with all
that a run imports (470 MiB) and what scoring and loading leave behind in the allocator.
cuda: a process's context and cuBLAS workspace, which nvidia-smi shows beyond torch's own bytes."""

BATCH_BYTES = 24
"""Of a token of the batch: input_ids, labels and position_ids, 8 each."""


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
    """Bytes of one training step in steady state: optimizer states exist from its start."""
    step = _Step(shape, setting, (setting.micro_batch,))
    return MemoryAccount(phases=step.terms())


def peaks(
    shape: ModelShape,
    settings: Sequence[MemorySetting],
    micro_batches: Sequence[int],
    *,
    accumulating: bool = False,
) -> Bytes:
    """The peak of ``account`` for each setting and micro-batch, [num_settings, num_batches].

    The settings may differ in their optimizer alone, which changes none of the passes.
    ``accumulating``: as if over several micro-batches.
    """
    if shape.attention == "math" and 1 in micro_batches and len(micro_batches) > 1:
        # A single row is a program of its own, as some kernels broadcast it without a copy.
        rows = np.array(micro_batches)
        one, more = (
            peaks(shape, settings, tuple(rows[those].tolist()), accumulating=accumulating)
            for those in (rows == 1, rows > 1)
        )
        return np.insert(more, np.flatnonzero(rows == 1), one, axis=1)
    passes: dict[float, Bytes] = {}
    found = []
    for setting in settings:
        key = step_bytes(setting) if setting.in_backward else -1.0
        if key not in passes:
            run = replace(setting, gradient_accumulation_steps=2) if accumulating else setting
            step = _Step(shape, run, tuple(micro_batches))
            *most, last = [instant.bytes for instant in step.instants().values()]
            passes[key] = np.maximum.reduce(most)
            held = step.held - step.states["optimizer_states"]
        states = 0.0 if setting.states_offloaded else state_bytes(shape, setting)
        update = last if setting.zeroth_order else sum(update_bytes(shape, setting))
        most_beside = np.maximum(passes[key], update)
        found.append(held + states / setting.num_devices + most_beside)
    return np.stack(found)


class _Instant(NamedTuple):
    """The highest instant of a phase: what it holds beside what holds always, and of what."""

    bytes: Bytes
    """[num_batches]"""
    of: Callable[[int], dict[str, float]]
    """Number of a batch -> the bytes by term."""


class _Step:
    """The phases of a training step under one setting; arrays have an entry a micro-batch."""

    def __init__(
        self, shape: ModelShape, setting: MemorySetting, micro_batches: tuple[int, ...]
    ) -> None:
        self.shape, self.setting = shape, setting
        self.setup = setup_of(shape, replace(setting, micro_batch=max(micro_batches)))
        self.passes = passes_of(shape, self.setup, micro_batches, setting.sequence)
        self.tokens, self.keys = self.passes.tokens, self.passes.keys
        self.itemsize = setting.trained_itemsize
        self.shards = setting.num_devices
        self.trained = trained(shape, setting)
        self.gradients = self.trained.num_elements * self.itemsize / self.shards
        # While gradients accumulate all exist, and a new one lives until it is added to the old.
        self.accumulating = setting.gradient_accumulation_steps > 1
        # A tied head's new gradient waits for the embedding's before it is added or used up.
        tied = shape.tie_word_embeddings and self.setup.trains_embedding(shape)
        self.tied = shape.head_parameters * self.itemsize if tied else 0.0
        # Bytes of an element of the gradients that stay as the backward goes on, and of one made.
        self.left = 0.0 if self.accumulating or setting.in_backward else self.itemsize / self.shards
        self.fresh = float(self.itemsize) if not self.left or self.shards > 1 else 0.0
        # And of one that an update uses up in the backward, beside what the update makes.
        self.update = step_bytes(setting) if setting.in_backward else 0.0
        self.per_element = (self.left, self.fresh, self.update)
        every = int(setting.recompute)
        depth = len(self.passes.kind_of)
        self.again = np.array([every > 0 and index % every == 0 for index in range(depth)])

    # -- what holds whatever the phase ------------------------------------------------------------

    @cached_property
    def states(self) -> dict[str, float]:
        setting, shape = self.setting, self.shape
        adapter = 0.0
        if setting.adapter is not None:
            adapter = float(self.trained.num_elements * setting.trained_itemsize)
        optimizer = 0.0 if setting.states_offloaded else state_bytes(shape, setting)
        held = {
            "weights": weight_bytes(shape, setting),
            "adapter": adapter,
            "optimizer_states": optimizer,
        }
        return {term: size / self.shards for term, size in held.items()}

    @cached_property
    def held(self) -> Bytes:
        """States and the batch: of every phase."""
        return sum(self.states.values()) + BATCH_BYTES * self.tokens

    @cached_property
    def gathered(self) -> float:
        """Sharded: the layer at work and the next one, whole."""
        if self.shards == 1:
            return 0.0
        layer = max(self.shape.layer_parameters(i) for i in range(self.shape.num_layers))
        return float(max(2 * layer, layer + self.shape.head_parameters) * self.setting.itemsize)

    @cached_property
    def logits(self) -> Bytes:
        """Of a model's output that stays alive."""
        element = self.shape.vocab_size * self.setting.itemsize if self.setting.holds_logits else 0
        return self.tokens * float(element)

    def terms(self) -> dict[str, dict[str, float]]:
        """Phase -> term -> bytes, of the first batch."""
        found = {}
        for phase, instant in self.instants().items():
            terms = dict.fromkeys(TERMS, 0.0) | self.states
            terms["temporaries"] += BATCH_BYTES * float(self.tokens[0])
            for term, size in instant.of(0).items():
                terms[term] += size
            found[phase] = terms
        return found

    def instants(self) -> dict[str, _Instant]:
        """The highest of each phase, the update of the weights last."""
        if self.setting.zeroth_order:
            return self._forwards() | {"perturbation": self.last()}
        return {
            "loss": _highest_of(_highest_of(self._head(), self._last_forward()), self._chunks()),
            "backward": _highest_of(self._layers(), self._embedding()),
            "optimizer": self.last(),
        }

    def last(self) -> _Instant:
        """The update of the weights: the only phase that the optimizer's own buffers enter."""
        return self._perturbation() if self.setting.zeroth_order else self._optimizer()

    # -- what is kept of a layer ------------------------------------------------------------------

    @cached_property
    def stored(self) -> Bytes:
        """What each layer leaves on the device after its forward, [num_layers, num_batches]: all it
        saves, or its input to recompute from, or nothing."""
        passes = self.passes
        if self.setting.offload:
            return np.zeros((len(passes.kind_of), len(self.tokens)))
        saved = passes.saved[passes.kind_of]
        if not self.again.any():
            return saved
        instead = passes.input
        if self.setting.selective:
            instead = instead + passes.products[passes.kind_of]
        return np.where(self.again[:, None], instead, saved)

    @cached_property
    def kept(self) -> Bytes:
        """By all layers and before them."""
        return self.passes.before + self.stored.sum(axis=0)

    def _parts(self, point: Point, batch: int, tokens: Bytes) -> tuple[float, float, float]:
        """At an instant: what autograd keeps, what lives beside it, and the gradients made."""
        kept, beside = (float(size.at(tokens[batch], self.keys)) for size in point[:2])
        left, fresh, update = self.per_element
        return kept, beside, point.done * left + point.fresh * fresh + point.updated * update

    def _gradients(self, fresh: float, done: float = 0.0) -> float:
        whole = self.gradients if self.accumulating else 0.0
        return whole + done * self.left + fresh

    # -- the phases -------------------------------------------------------------------------------

    def _head(self) -> _Instant:
        """The end of the forward and the start of the backward: logits of all tokens, or of a chunk
        at a time. Then a chunk's logits are made again in the backward, and the head's gradient is
        summed up over the chunks."""
        chunk, last, passes = self.setting.loss_chunk, self.passes.last, self.passes
        tokens = np.minimum(self.tokens, float(chunk)) if chunk else self.tokens
        both = last.forward.points + last.backward.points
        columns = np.concatenate([last.forward.columns, last.backward.columns])
        most, at = Instants(both, columns).highest(tokens, self.keys, self.per_element)
        # The hidden states and their gradient wait for the chunks.
        waiting = 2.0 * passes.input if chunk else np.zeros_like(self.tokens)
        summed = last.weight_elements * self.itemsize if chunk else 0.0

        def terms(batch: int) -> dict[str, float]:
            kept, beside, made = self._parts(both[at[batch]], batch, tokens)
            return {
                "activations": float(self.kept[batch] + waiting[batch]),
                "logits": kept + beside,
                "gradients": self._gradients(made + summed),
                "temporaries": self.gathered,
            }

        held = self._gradients(summed) + self.gathered
        return _Instant(self.kept + waiting + most + held, terms)

    def _chunks(self) -> _Instant | None:
        """The head's gradient of a chunk is added to that of the others, out of place."""
        elements, chunk = self.passes.last.weight_elements, self.setting.loss_chunk
        if not (elements and chunk):
            return None
        gradients = self._gradients(3.0 * elements * self.itemsize)
        held = np.where(self.tokens > chunk, self.kept + 2.0 * self.passes.input, 0.0)

        def terms(batch: int) -> dict[str, float]:
            return {
                "activations": float(held[batch]),
                "gradients": gradients,
                "temporaries": self.gathered,
            }

        return _Instant(held + gradients * (held > 0) + self.gathered, terms)

    def _last_forward(self) -> _Instant:
        """The last layer's forward, which may hold more than the head."""
        top, setting = self.passes.kinds[self.passes.kind_of[-1]], self.setting
        points, below = top.forward, self.kept - self.stored[-1]
        if self.again[-1] or setting.offload:
            selective = setting.selective and not setting.offload
            points = top.forward_selective if selective else top.forward_bare
            below = below + self.passes.input
        most, at = points.highest(self.tokens, self.keys)

        def terms(batch: int) -> dict[str, float]:
            kept, beside, _ = self._parts(points.points[at[batch]], batch, self.tokens)
            return {
                "activations": float(below[batch]) + kept,
                "gradients": self._gradients(0.0),
                "temporaries": beside + self.gathered,
            }

        return _Instant(below + most + self._gradients(0.0) + self.gathered, terms)

    def _layers(self) -> _Instant:
        """From the last layer down, each leaving its weights' gradients."""
        passes, kinds = self.passes, self.passes.kind_of
        modes = {"offload" if self.setting.offload else "backward": ~self.again}
        modes["selective" if self.setting.selective else "recompute"] = self.again
        most = np.zeros_like(self.stored)
        where = np.zeros(self.stored.shape, dtype=int)
        for mode, chosen in modes.items():
            if chosen.any():
                highest, at = passes.highest(mode, self.per_element)
                most[chosen], where[chosen] = highest[kinds[chosen]], at[kinds[chosen]]
        # What a recomputed layer starts from waits beside its second forward.
        waiting = np.where(self.again[:, None], passes.input, 0.0)
        below = passes.before + np.cumsum(self.stored, axis=0) - self.stored + waiting
        below[0] -= passes.lone  # the lowest layer is of the other kind
        held = below + most + passes.done[:, None] * self.left
        layer = np.argmax(held, axis=0)
        batches = np.arange(len(self.tokens))
        pending = 0.0 if self.left else self.tied

        def terms(batch: int) -> dict[str, float]:
            index = layer[batch]
            mode = next(mode for mode, chosen in modes.items() if chosen[index])
            points = getattr(passes.kinds[kinds[index]], mode).points
            kept, beside, made = self._parts(points[where[index, batch]], batch, self.tokens)
            return {
                "activations": float(below[index, batch]) + kept,
                "logits": float(self.logits[batch]),
                "gradients": self._gradients(made + pending, float(passes.done[index])),
                "temporaries": beside + self.gathered,
            }

        rest = self.logits + self._gradients(pending) + self.gathered
        return _Instant(held[layer, batches] + rest, terms)

    def _embedding(self) -> _Instant | None:
        """The embedding's gradient is dense. Tied to the head it is added to the head's, whose sum
        is a third buffer; while gradients accumulate there is the old one too."""
        if not self.setup.trains_embedding(self.shape):
            return None
        table = float(self.shape.head_parameters * self.itemsize)
        copies = (2.0 if self.shape.tie_word_embeddings else 0.0) + self.accumulating
        gradients = table if self.setting.in_backward else self.gradients
        beside = copies * table + self.passes.input
        beside = np.maximum(beside, self.update * self.shape.head_parameters)

        def terms(batch: int) -> dict[str, float]:
            return {
                "gradients": gradients,
                "logits": float(self.logits[batch]),
                "temporaries": float(beside[batch]) + self.gathered,
            }

        return _Instant(beside + self.logits + gradients + self.gathered, terms)

    def _optimizer(self) -> _Instant:
        gradients, allocated = update_bytes(self.shape, self.setting)

        def terms(batch: int) -> dict[str, float]:
            return {"gradients": gradients, "temporaries": allocated}

        return _Instant(np.zeros_like(self.tokens) + gradients + allocated, terms)

    def _forwards(self) -> dict[str, _Instant]:
        """Zeroth order: two forwards, between which every weight in turn gets its noise."""

        def forward(points: Instants, term: str) -> _Instant:
            most, at = points.highest(self.tokens, self.keys)

            def terms(batch: int) -> dict[str, float]:
                kept, beside, _ = self._parts(points.points[at[batch]], batch, self.tokens)
                return {term: kept + beside, "temporaries": self.gathered}

            return _Instant(most + self.gathered, terms)

        top = self.passes.kinds[self.passes.kind_of[-1]]
        return {
            "layers": forward(top.forward, "activations"),
            "loss": forward(self.passes.last.forward, "logits"),
        }

    def _perturbation(self) -> _Instant:
        largest = max(self.shape.head_parameters, largest_tensor(self.shape))
        noise = float(largest * self.setting.itemsize)
        return _Instant(np.zeros_like(self.tokens) + noise, lambda batch: {"temporaries": noise})


def _highest_of(one: _Instant, other: _Instant | None) -> _Instant:
    """Of two instants the one that holds more, batch by batch."""
    if other is None:
        return one

    def terms(batch: int) -> dict[str, float]:
        return (one if one.bytes[batch] >= other.bytes[batch] else other).of(batch)

    return _Instant(np.maximum(one.bytes, other.bytes), terms)


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
    step = _Step(shape, setting, micro_batches)
    return step.kept + (step.passes.bytes(step.passes.last.saved) if head else 0.0)
