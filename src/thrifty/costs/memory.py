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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.costs.layer import Setup
from thrifty.costs.liveness import Instants, Point, pieces
from thrifty.costs.operations import Adapter, Size, total
from thrifty.costs.setting import ADAMW, MemorySetting, States, Storage, setup_of
from thrifty.costs.shape import ITEMSIZE, ModelShape
from thrifty.costs.trained import trained

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.float64]
    Terms = dict[str, Bytes]

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
    step = _Step(shape, setting, [setting.micro_batch])
    return MemoryAccount(
        phases={
            phase: {term: float(size[0]) for term, size in terms.items()}
            for phase, terms in step.phases().items()
        }
    )


def peaks(shape: ModelShape, setting: MemorySetting, micro_batches: Sequence[int]) -> Bytes:
    """The peak of ``account`` at each micro-batch, [len(micro_batches)]."""
    phases = _Step(shape, setting, micro_batches).phases()
    return np.maximum.reduce([_sum(terms) for terms in phases.values()])


class _Step:
    """The amounts that the phases of a training step share; every array is one entry a batch."""

    def __init__(
        self, shape: ModelShape, setting: MemorySetting, micro_batches: Sequence[int]
    ) -> None:
        self.shape, self.setting = shape, setting
        self.setup = setup_of(shape, setting)
        self.tokens = np.asarray(micro_batches, dtype=float) * setting.sequence
        self.keys = float(setting.sequence)
        self.none = np.zeros_like(self.tokens)
        self.trained = trained(shape, setting)
        self.states = self._states()
        self.itemsize = setting.trained_itemsize
        self.shards = setting.num_devices
        self.gradients = self.trained.num_elements * self.itemsize / self.shards
        # While gradients accumulate all exist, and a new one lives until it is added to the old.
        self.accumulating = setting.gradient_accumulation_steps > 1
        self.first, *self.body, self.last = pieces(shape, self.setup)
        self.before = self.bytes(total((self.first.saved, _shared(shape, self.setup))))
        self._stored: dict[tuple[int, bool], Bytes] = {}

    def phases(self) -> dict[str, Terms]:
        if self.setting.zeroth_order:
            return self._forwards()
        step = {"loss": self._loss(), "backward": self._backward()}
        return step | {"optimizer": self._optimizer()}

    def bytes(self, size: Size) -> Bytes:
        return self.none + size.at(self.tokens, self.keys)

    # -- what holds whatever the batch ------------------------------------------------------------

    def _states(self) -> Terms:
        setting, shape = self.setting, self.shape
        adapter = 0.0
        if setting.adapter is not None:
            adapter = float(self.trained.num_elements * setting.trained_itemsize)
        sizes = {
            "weights": weight_bytes(shape, setting) / setting.num_devices,
            "adapter": adapter / setting.num_devices,
            "optimizer_states": 0.0
            if setting.states_offloaded
            else state_bytes(shape, setting) / setting.num_devices,
        }
        return {term: self.none + sizes.get(term, 0.0) for term in TERMS}

    def _gathered(self) -> float:
        """Sharded: the layer at work and the next one, whole."""
        if self.shards == 1:
            return 0.0
        layer = max(self.shape.layer_parameters(i) for i in range(self.shape.num_layers))
        ends = self.shape.head_parameters
        return float(max(2 * layer, layer + ends) * self.setting.itemsize)

    # -- what is kept of a layer ------------------------------------------------------------------

    def _recomputes(self, index: int) -> bool:
        every = int(self.setting.recompute)
        return every > 0 and index % every == 0

    def _kept(self, index: int) -> Bytes:
        """What a layer leaves on the device after its forward: all it saves, or its input to
        recompute from, or nothing."""
        piece, again = self.body[index], self._recomputes(index)
        key = id(piece), again
        if key not in self._stored:
            parts = [piece.saved]
            if again:
                parts = [piece.input, piece.products] if self.setting.selective else [piece.input]
            stays = self.none if self.setting.offload else self.bytes(total(parts))
            self._stored[key] = stays
        return self._stored[key]

    def _instants(self, index: int) -> Instants:
        piece = self.body[index]
        if not self._recomputes(index):
            return piece.backward
        return piece.selective if self.setting.selective else piece.recompute

    def _highest(self, points: Instants, tokens: Bytes | None = None) -> tuple[Bytes, Any]:
        done, fresh = (0.0, self.itemsize) if self._drops else (self.itemsize, 0.0)
        return points.highest(self.tokens if tokens is None else tokens, self.keys, done, fresh)  # type: ignore[arg-type]

    @property
    def _drops(self) -> bool:
        """Gradients made do not add to those that are there: all are, or each goes at once."""
        return self.accumulating or self.setting.in_backward

    def _terms(
        self, done: Any, activations: Bytes, points: Sequence[Point], *, of_head: bool = False
    ) -> Terms:
        """The terms at one instant a batch, the backward having left ``done`` elements before."""
        sizes = [(p.kept, p.beside) for p in points]
        kept = np.array([k.at(t, self.keys) for (k, _), t in zip(sizes, self.tokens, strict=True)])
        beside = np.array(
            [b.at(t, self.keys) for (_, b), t in zip(sizes, self.tokens, strict=True)]
        )
        left = (done + np.array([p.done for p in points])) * float(self.itemsize)
        fresh = np.array([float(p.fresh) for p in points]) * self.itemsize
        if self.accumulating:
            left = self.none + self.gradients * self.shards
        elif self.setting.in_backward:
            left = self.none
        return self.states | {
            "gradients": left / self.shards + (fresh if self.shards > 1 else 0.0),
            "activations": activations + (0.0 if of_head else kept),
            "logits": kept + beside if of_head else self.none + self._held_logits(),
            "temporaries": BATCH_BYTES * self.tokens
            + self._gathered()
            + (fresh if self._drops else 0.0)
            + (0.0 if of_head else beside),
        }

    def _held_logits(self) -> Bytes:
        if not self.setting.holds_logits:
            return self.none
        return self.tokens * float(self.shape.vocab_size * self.setting.itemsize)

    # -- the phases -------------------------------------------------------------------------------

    def _layers_kept(self) -> Bytes:
        return self.before + sum(self._kept(index) for index in range(len(self.body)))

    def _loss(self) -> Terms:
        """The end of the forward and the start of the backward, or the last layer's forward."""
        layers = self._layers_kept()
        head = self._head(layers)
        if self._recomputes(len(self.body) - 1):
            return head
        forward = self.body[-1].forward
        _, at = self._highest(forward)
        top = self._terms(
            0.0, layers - self._kept(len(self.body) - 1), [forward.points[i] for i in at]
        )
        return _larger(head, top)

    def _head(self, layers: Bytes) -> Terms:
        """Logits of all tokens, or of a chunk at a time: then the chunk's logits are made again in
        the backward, and the head's gradient is summed up over the chunks."""
        chunk = self.setting.loss_chunk
        tokens = self.tokens
        if chunk:
            tokens = np.minimum(self.tokens, float(chunk))
        both = Instants(
            self.last.forward.points + self.last.backward.points,
            np.concatenate([self.last.forward.columns, self.last.backward.columns]),
        )
        _, at = self._highest(both, tokens)
        whole, self.tokens = self.tokens, tokens
        terms = self._terms(0.0, self.none, [both.points[i] for i in at], of_head=True)
        self.tokens = whole
        hidden = self.bytes(self.last.input)
        terms["activations"] = layers + (2.0 * hidden if chunk else 0.0)
        terms["temporaries"] = terms["temporaries"] + BATCH_BYTES * (whole - tokens)
        if chunk and self.last.weight_elements:
            terms["gradients"] = terms["gradients"] + self.last.weight_elements * self.itemsize
        return terms

    def _backward(self) -> Terms:
        """From the last layer down, each leaving its weights' gradients; then the embedding."""
        depth = len(self.body)
        tops = {}
        for index, piece in enumerate(self.body):
            key = (id(piece), self._recomputes(index))
            if key not in tops:
                tops[key] = self._highest(self._instants(index))
        kept = np.stack([self._kept(index) for index in range(depth)])
        below = self.before + np.cumsum(kept, axis=0) - kept
        # What a recomputed layer starts from waits beside its second forward.
        again = np.stack(
            [
                self.bytes(self.body[index].input) if self._recomputes(index) else self.none
                for index in range(depth)
            ]
        )
        elements = np.array([piece.weight_elements for piece in self.body], dtype=float)
        done = self.last.weight_elements + elements.sum() - np.cumsum(elements)
        highest = np.stack(
            [tops[id(piece), self._recomputes(index)][0] for index, piece in enumerate(self.body)]
        )
        left = 0.0 if self._drops else self.itemsize / self.shards
        at = np.argmax(below + again + highest + done[:, None] * left, axis=0)
        batches = np.arange(len(self.tokens))
        points = [
            self._instants(index).points[
                tops[id(self.body[index]), self._recomputes(index)][1][batch]
            ]
            for batch, index in zip(batches, at, strict=True)
        ]
        best = self._terms(done[at], (below + again)[at, batches], points)
        if not self.setup.trains_embedding(self.shape):
            return best
        return _larger(best, self._embedding())

    def _embedding(self) -> Terms:
        """The embedding's gradient is dense. Tied to the head it is added to the head's, whose sum
        is a third buffer; while gradients accumulate there is the old one too."""
        end = self._terms(0.0, self.none, [Point()] * len(self.tokens))
        copies = (2.0 if self.shape.tie_word_embeddings else 0.0) + self.accumulating
        table = float(self.shape.head_parameters * self.itemsize)
        end["gradients"] = self.none + (table if self.setting.in_backward else self.gradients)
        end["temporaries"] = end["temporaries"] + copies * table + self.bytes(self.last.input)
        return end

    def _optimizer(self) -> Terms:
        end = self._terms(0.0, self.none, [Point()] * len(self.tokens))
        largest = self.trained.largest * self.itemsize
        end["gradients"] = self.none + (largest if self.setting.in_backward else self.gradients)
        end["temporaries"] = end["temporaries"] - self._gathered() + self._step_bytes()
        end["logits"] = self.none
        return end

    def _step_bytes(self) -> float:
        """What the optimizer's step allocates."""
        setting, states = self.setting, self.setting.states
        if states is ADAMW and not setting.fused:
            states = UNFUSED_ADAMW[setting.device_kind]
        of_all = states.step_all * self.gradients
        of_largest = states.step_largest * self.trained.largest
        if states is UNFUSED_ADAMW["cpu"]:
            of_largest *= self.itemsize
        if setting.states_offloaded:  # one tensor's states visit at a time
            of_largest += states.relative * self.itemsize * self.trained.largest
        return float(of_all + of_largest)

    def _forwards(self) -> dict[str, Terms]:
        """Zeroth order: two forwards, between which every weight in turn gets its noise."""
        points = {"layers": self.body[-1].forward, "loss": self.last.forward}
        found = {}
        for phase, instants in points.items():
            _, at = instants.highest(self.tokens, self.keys)  # type: ignore[arg-type]
            chosen = [instants.points[i] for i in at]
            found[phase] = self._terms(0.0, self.none, chosen, of_head=phase == "loss")
        noise = self._terms(0.0, self.none, [Point()] * len(self.tokens))
        largest = max(self.shape.head_parameters, _largest_layer_tensor(self.shape))
        noise["temporaries"] = noise["temporaries"] + float(largest * self.setting.itemsize)
        return found | {"perturbation": noise}


UNFUSED_ADAMW = {
    "cuda": States(name="adamw", relative=2.0, step_all=1.0),
    "cpu": States(name="adamw", relative=2.0, step_largest=2.0),
}
"""``foreach`` on CUDA makes a copy of everything, the loop on a CPU two of the largest tensor."""


def _sum(terms: Terms) -> Bytes:
    return sum(terms.values())  # type: ignore[return-value]


def _larger(one: Terms, other: Terms) -> Terms:
    """Of two instants the one that holds more, batch by batch."""
    first = _sum(one) >= _sum(other)
    return {term: np.where(first, one[term], other[term]) for term in TERMS}


# -- whatever the batch ---------------------------------------------------------------------------


def weight_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of the model's own weights as they lie in memory."""
    whole = float(shape.num_parameters * setting.itemsize)
    if setting.storage is None:
        return whole
    for index in range(shape.num_layers):
        for linear in shape.linears_of(index):
            whole -= linear.in_features * linear.out_features * setting.itemsize
            whole += setting.storage.bytes_of(linear)
    return whole


def state_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of the optimizer's states."""
    found, states, itemsize = trained(shape, setting), setting.states, setting.trained_itemsize
    size = states.vector_bytes(found.vector_elements, itemsize)
    for (rows, columns), count in found.matrices.items():
        size += count * states.matrix_bytes(rows, columns, itemsize)
    for (rows, columns), count in found.embeddings.items():
        if states.wide_embedding:
            size += count * rows * columns * states.wide_embedding
        else:
            size += count * states.matrix_bytes(rows, columns, itemsize)
    return size


def _largest_layer_tensor(shape: ModelShape) -> int:
    largest = max(
        linear.in_features * linear.out_features
        for index in range(shape.num_layers)
        for linear in shape.linears_of(index)
    )
    if shape.experts is not None:
        one = 2 * shape.hidden_size * shape.experts.intermediate_size
        largest = max(largest, shape.experts.num_experts * one)
    return largest


def num_trained(shape: ModelShape, setting: MemorySetting) -> int:
    """Elements that get a gradient."""
    return trained(shape, setting).num_elements


def kv_cache_bytes(shape: ModelShape, batch: int, context: int, dtype: str) -> float:
    """Keys and values of ``context`` tokens in every layer; windows hold at most their length."""
    window = min(context, shape.sliding_window) if shape.sliding_window else context
    full = shape.num_layers - shape.num_sliding_layers
    held = full * context + shape.num_sliding_layers * window
    return float(batch * held * shape.cached_size * ITEMSIZE[dtype])


def checkpoint_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Bytes on disk of a checkpoint to resume from: what is trained, and its optimizer states.

    Full fine-tuning saves the model, an adapter only itself.
    """
    weights = num_trained(shape, setting) * setting.trained_itemsize
    return weights + state_bytes(shape, setting)


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
        _, at = instants.highest(tokens, float(sequence))  # type: ignore[arg-type]
        most = instants.points[at[0]].beside.at(setting.tokens, sequence)
        masks = _shared(shape, setup, held=phase == "layers").at(setting.tokens, sequence)
        phases[phase] = dict.fromkeys(TERMS, 0.0) | {
            "weights": weights,
            "activations" if phase == "layers" else "logits": most,
            "temporaries": held + masks,
        }
    return MemoryAccount(phases=phases)


def saved_bytes(shape: ModelShape, setting: MemorySetting, *, head: bool = True) -> float:
    """What autograd keeps at the end of the forward, with or without what the head keeps."""
    step = _Step(shape, setting, [setting.micro_batch])
    kept = step._layers_kept()
    return float((kept + (step.bytes(step.last.saved) if head else 0.0))[0])


def _shared(shape: ModelShape, setup: Setup, *, held: bool = False) -> Size:
    """What all layers share: rotary cos and sin, and the masks where something holds them."""
    kinds = 2 if 0 < shape.num_sliding_layers < shape.num_layers else 1
    tables = kinds if shape.rotary_per_kind else 1
    itemsize = 4 if shape.wide_rotary else setup.itemsize
    token = tables * 2.0 * shape.rotary_dim * itemsize if setup.backward else 0.0
    # The model holds its masks during the forward; a recomputation needs them to its end.
    eager = shape.attention == "eager"
    builds = (setup.masked and shape.model_type != "opt") or setup.window_masked or eager
    masks = kinds * (setup.itemsize if eager else 1.0)
    return Size(token, masks if builds and (held or setup.recompute) else 0.0)
