"""Bytes held at the peak of a training step, per phase and per term.

A step has three phases, and its peak is the largest of them, never their sum:

    loss       weights + optimizer + activations of all layers + logits in float32 (about 12 V T)
    backward   weights + optimizer + gradients so far + activations not yet consumed + temporaries
    optimizer  weights + optimizer + gradients + what the optimizer allocates

What autograd keeps of each layer, and which gradient buffers live beside it in the backward, is read
off the layer's operations (``layer.py``), so recomputation, adapters, masks, dropout and dtypes need no
rules of their own here. For a bf16 Llama layer without a mask it comes to the known
T (20 h + 4 kv + 8 f + 4 a + 8).

Counted are bytes that PyTorch allocates. Not counted: what the allocator reserves on top, files in
the page cache, data loader workers. On a CPU the resident set also holds ``runtime_bytes`` and, with
glibc's default malloc, 12-24% of fragmentation (none with MALLOC_MMAP_THRESHOLD_=65536).

Limits: AdamW; one device; no autocast (the model itself has ``dtype``), quantisation or offload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from thrifty.costs.layer import Setup, embedding, head, layers
from thrifty.costs.operations import Adapter, Operation, Size, recomputed, saved, total
from thrifty.costs.shape import ITEMSIZE, ModelShape

TERMS = (
    "weights",
    "adapter",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "temporaries",
)

RUNTIME_BYTES = {"cpu": 360 * 2**20, "cuda": 520 * 2**20}
"""Calibrated, not derived. cpu: resident set of Python with torch, transformers and peft loaded.
cuda: context and cuBLAS workspace of one process, as nvidia-smi shows beyond torch's reserved bytes."""

BATCH_BYTES = 24
"""Of a token of the batch: input_ids, labels and position_ids, 8 each."""

WORKSPACE = {"square": 2.0, "rotate": 1.5, "weigh": 1.0, "gelu_new": 1.0}
"""Buffers that a backward made of several kernels needs beside the gradients, in outputs."""


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """One way to run the training step."""

    micro_batch: int = 1
    sequence: int = 1024
    """Tokens of a row, padding included."""
    dtype: str = "bfloat16"
    """Of the model's weights; gradients and AdamW's states follow it."""
    adapter: Adapter | None = None
    adapter_dtype: str = "float32"
    """PEFT keeps adapters in float32 unless told otherwise."""
    recompute: bool = False
    optimizer: str = "adamw"
    fused: bool = True
    """``adamw_torch_fused``. Unfused AdamW allocates more: on CUDA a copy of what it trains."""
    masked: bool = True
    """Attention gets a mask: rows are packed with several documents, or padded."""
    gradient_accumulation_steps: int = 1
    device_kind: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("micro_batch", "sequence", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1\nhint: leave it out for the default")
        for name in ("dtype", "adapter_dtype"):
            if getattr(self, name) not in ITEMSIZE:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known\nhint: use {', '.join(ITEMSIZE)}"
                )
        if self.optimizer not in OPTIMIZER_STATES:
            raise ValueError(
                f"optimizer {self.optimizer!r} is not known\n"
                f"hint: use {', '.join(OPTIMIZER_STATES)}"
            )
        if self.device_kind not in RUNTIME_BYTES:
            raise ValueError(
                f"device kind {self.device_kind!r} is not known\nhint: use cpu or cuda"
            )

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence


OPTIMIZER_STATES = {"adamw": 2.0}
"""Bytes of state per byte of trained weight: AdamW keeps two moments in the weight's dtype."""


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


class Point(NamedTuple):
    """An instant of a pass: what autograd keeps, what lives beside it, and of how many weights
    the backward has left a gradient."""

    kept: Size
    beside: Size
    weight_elements: int = 0

    def at(self, tokens: int, keys: int, itemsize: float) -> float:
        held = self.kept.at(tokens, keys) + self.beside.at(tokens, keys)
        return held + self.weight_elements * itemsize


class Piece(NamedTuple):
    """A run of operations, as the account needs it."""

    saved: Size
    """Kept from its forward to its backward."""
    forward: tuple[Point, ...]
    recompute: tuple[Point, ...]
    """Its second forward, when it is recomputed."""
    backward: tuple[Point, ...]
    weight_elements: int
    """Elements that get a gradient."""


def account(shape: ModelShape, setting: MemorySetting) -> MemoryAccount:
    """Bytes of one training step in steady state: optimizer states exist from its start."""
    tokens, keys = setting.tokens, setting.sequence
    setup = _setup(shape, setting)
    states = _states(shape, setting)
    trained, itemsize = states.pop("trained"), states.pop("itemsize")
    gradients = trained * itemsize
    accumulating = setting.gradient_accumulation_steps > 1
    table = shape.head_parameters * itemsize if setup.trains_all else 0.0
    batch = float(BATCH_BYTES * tokens)

    def phase(gradients: float, activations: float, logits: float, temporaries: float):  # noqa: ANN202
        return states | {
            "gradients": gradients,
            "activations": activations,
            "logits": logits,
            "temporaries": temporaries + batch,
        }

    first, *body, last = _pieces(shape, setup)
    start = total((first.saved, _shared(shape, setup))).at(tokens, keys)
    kept = [_stored(shape, setup, piece).at(tokens, keys) for piece in body]

    activations = start + sum(kept)
    # While gradients accumulate, a weight's new one lives beside the old only until it is added.
    fresh = 0.0 if accumulating else itemsize
    point = _highest((*last.forward, *last.backward), tokens, keys, fresh)
    so_far = gradients if accumulating else 0.0
    phases = {
        "loss": phase(
            so_far + point.weight_elements * fresh, activations, point.at(tokens, keys, 0.0), 0.0
        )
    }

    # From the last layer down. What a layer's backward leaves are its weights' gradients.
    best: dict[str, float] = {}
    distinct = {id(piece): piece for piece in body}
    highest = {
        key: _highest(
            (*piece.recompute, *piece.backward) if setup.recompute else piece.backward,
            tokens,
            keys,
            fresh,
        )
        for key, piece in distinct.items()
    }
    so_far += last.weight_elements * fresh
    for index in reversed(range(len(body))):
        piece = body[index]
        activations -= kept[index]
        stored = kept[index] if setup.recompute else 0.0
        point = highest[id(piece)]
        candidate = phase(
            so_far + point.weight_elements * fresh,
            activations + stored + point.kept.at(tokens, keys),
            0.0,
            point.beside.at(tokens, keys),
        )
        so_far += piece.weight_elements * fresh
        best = max(best, candidate, key=lambda terms: sum(terms.values()))
    # The embedding's gradient is dense. Tied to the head it is added to the head's, out of place.
    copies = (2.0 if shape.tie_word_embeddings else 0.0) + accumulating
    hidden = shape.hidden_size * setup.itemsize * tokens if table else 0.0
    candidate = phase(gradients, 0.0, 0.0, copies * table + hidden)
    phases["backward"] = max(best, candidate, key=lambda terms: sum(terms.values()))

    phases["optimizer"] = phase(gradients, 0.0, 0.0, _optimizer_temporaries(shape, setting, gradients))
    return MemoryAccount(phases=phases)


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
    setup = _setup(shape, setting, backward=False)
    tokens, keys = setting.tokens, sequence
    _, *body, last = _pieces(shape, setup)
    pieces = {"layers": _highest(body[0].forward, tokens, keys)}
    if loss:
        pieces["loss"] = _highest(last.forward, tokens, keys)
    weights = float(shape.num_parameters * setup.itemsize)
    masks = _shared(shape, setup, masks=True).at(tokens, keys)
    phases = {}
    for name, point in pieces.items():
        phases[name] = dict.fromkeys(TERMS, 0.0) | {
            "weights": weights,
            "activations" if name == "layers" else "logits": point.beside.at(tokens, keys),
            "temporaries": BATCH_BYTES * tokens + (masks if name == "layers" else 0.0),
        }
    return MemoryAccount(phases=phases)


def kv_cache_bytes(shape: ModelShape, batch: int, context: int, dtype: str) -> float:
    """Keys and values of ``context`` tokens in every layer; windows hold at most their length."""
    window = min(context, shape.sliding_window) if shape.sliding_window else context
    full = shape.num_layers - shape.num_sliding_layers
    held = full * context + shape.num_sliding_layers * window
    return 2.0 * batch * held * shape.key_value_size * ITEMSIZE[dtype]


def checkpoint_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Bytes on disk of a checkpoint to resume from: what is trained, and its optimizer states.

    Full fine-tuning saves the model, an adapter only itself.
    """
    states = _states(shape, setting)
    return states["trained"] * states["itemsize"] + states["optimizer_states"]


def saved_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """What autograd keeps at the end of the forward: activations and the loss's log-probabilities."""
    tokens, keys = setting.tokens, setting.sequence
    setup = _setup(shape, setting)
    first, *body, last = _pieces(shape, setup)
    sizes = [_stored(shape, setup, piece) for piece in body]
    sizes += [first.saved, last.saved, _shared(shape, setup, masks=False)]
    return total(sizes).at(tokens, keys)


def _setup(shape: ModelShape, setting: MemorySetting, *, backward: bool = True) -> Setup:
    return Setup(
        itemsize=ITEMSIZE[setting.dtype],
        adapter_itemsize=ITEMSIZE[setting.adapter_dtype],
        on_cpu=setting.device_kind == "cpu",
        adapter=setting.adapter,
        recompute=setting.recompute,
        backward=backward,
        training=backward,
        masked=setting.masked,
        window_masked=0 < shape.sliding_window <= setting.sequence,
    )


def _states(shape: ModelShape, setting: MemorySetting) -> dict[str, float]:
    """The terms that hold whatever the batch; and how many elements are trained, of what size."""
    terms: dict[str, float] = dict.fromkeys(TERMS, 0.0)
    terms["weights"] = float(shape.num_parameters * ITEMSIZE[setting.dtype])
    trained, itemsize = float(shape.num_parameters), ITEMSIZE[setting.dtype]
    if setting.adapter is not None:
        trained, itemsize = setting.adapter.num_parameters(shape), ITEMSIZE[setting.adapter_dtype]
        terms["adapter"] = float(trained * itemsize)
    terms["optimizer_states"] = trained * itemsize * OPTIMIZER_STATES[setting.optimizer]
    return terms | {"trained": float(trained), "itemsize": float(itemsize)}


def _optimizer_temporaries(
    shape: ModelShape, setting: MemorySetting, gradients: float
) -> float:
    """Unfused AdamW: on CUDA (foreach) a copy of everything, on a CPU two of the largest tensor."""
    if setting.fused:
        return 0.0
    if setting.device_kind == "cuda":
        return gradients
    if setting.adapter is not None:
        widest = max(max(each.in_features, each.out_features) for each in shape.linears)
        return 2.0 * setting.adapter.rank * widest * ITEMSIZE[setting.adapter_dtype]
    largest = max(shape.head_parameters, *(each.in_features * each.out_features for each in shape.linears))
    return 2.0 * largest * ITEMSIZE[setting.dtype]


def _shared(shape: ModelShape, setup: Setup, *, masks: bool | None = None) -> Size:
    """What all layers share: rotary cos and sin, and the masks where something holds them."""
    kinds = 2 if 0 < shape.num_sliding_layers < shape.num_layers else 1
    tables = kinds if shape.model_type == "gemma3_text" else 1
    token = tables * 2.0 * shape.rotary_dim * setup.itemsize if setup.backward else 0.0
    # During the forward the model holds its masks, under recomputation until the backward is done.
    holds = setup.recompute if masks is None else masks
    eager = shape.attention == "eager"
    builds = (setup.masked and shape.model_type != "opt") or setup.window_masked or eager
    return Size(token, kinds * (setup.itemsize if eager else 1.0) if builds and holds else 0.0)


def _stored(shape: ModelShape, setup: Setup, piece: Piece) -> Size:
    """What a layer leaves after its forward: all it saves, or its input when it is recomputed."""
    return Size(float(shape.hidden_size * setup.itemsize)) if setup.recompute else piece.saved


def _highest(points: Iterable[Point], tokens: int, keys: int, itemsize: float = 0.0) -> Point:
    """The instant that holds most; ``itemsize``: of the weight gradients that it adds."""
    return max(points, key=lambda point: point.at(tokens, keys, itemsize))


@lru_cache(maxsize=2048)
def _pieces(shape: ModelShape, setup: Setup) -> tuple[Piece, ...]:
    """The embedding, every layer, the head. Equal layers are the same object."""
    known: dict[int, Piece] = {}
    programs = (embedding(shape, setup), *layers(shape, setup), head(shape, setup))
    for operations in programs:
        if id(operations) not in known:
            known[id(operations)] = _piece(operations)
    return tuple(known[id(operations)] for operations in programs)


def _piece(operations: tuple[Operation, ...]) -> Piece:
    backward, waiting = _backward_points(operations)
    return Piece(
        saved=total(tensor.size for tensor in saved(operations).values()),
        forward=_forward_points(operations),
        recompute=_forward_points(operations, waiting),
        backward=backward,
        weight_elements=sum(each.weight_elements for each in operations if each.trained),
    )


def _forward_points(
    operations: Sequence[Operation], waiting: Size | None = None
) -> tuple[Point, ...]:
    """Each operation with its inputs and output alive; a tensor dies after its last reader.

    ``waiting``: gradients that wait meanwhile, in a recomputation, whose input is stored already.
    """
    last = {t.name: i for i, each in enumerate(operations) for t in (*each.reads, each.writes)}
    keeping = saved(operations)
    kept: dict[str, Size] = {}
    live: dict[str, Size] = {}
    points = []
    executed = operations if waiting is None else recomputed(operations)
    for index, each in enumerate(executed):
        for tensor in (*each.reads, each.writes, *each.saves):
            (kept if tensor.name in keeping else live)[tensor.name] = tensor.size
        if waiting is not None:
            live["waiting"] = waiting
            live.pop("input", None)
            kept.pop("input", None)
        points.append(Point(total(kept.values()), total(live.values())))
        live = {name: size for name, size in live.items() if last.get(name, -1) > index}
    return tuple(points)


def _backward_points(operations: Sequence[Operation]) -> tuple[tuple[Point, ...], Size]:
    """The operations in reverse, each with the gradients it reads and writes alive. What it saved
    goes once the last operation that shares it is done.

    Also the gradients alive when it first needs something saved, which starts a recomputation.
    """
    holders: dict[str, int] = {}
    for each in operations:
        for tensor in each.saves:
            holders[tensor.name] = holders.get(tensor.name, 0) + 1
    kept = {name: tensor.size for name, tensor in saved(operations).items()}
    out = operations[-1].writes
    gradients = {out.name: out.size}
    points, done, waiting = [Point(Size(), Size())], 0, None
    for each in reversed(operations):
        if not each.writes.grad or each.writes.name not in gradients:
            continue
        if each.packs and waiting is None:
            waiting = total(gradients.values())
        written = _gradients_written(each)
        work = each.writes.size.times(WORKSPACE.get(each.kind, 0.0))
        beside = total((*gradients.values(), *written.values(), work))
        done += each.weight_elements if each.trained else 0
        points.append(Point(total(kept.values()), beside, done))
        del gradients[each.writes.name]
        for name, size in written.items():
            gradients[name] = max(size, gradients.get(name, Size()))
        for tensor in each.saves:
            holders[tensor.name] -= 1
            if not holders[tensor.name]:
                del kept[tensor.name]
    return tuple(points), waiting or Size()


def _gradients_written(operation: Operation) -> dict[str, Size]:
    """The gradient buffers that an operation's backward fills. A sum hands its own on instead: the
    first of equal size takes it over."""
    needing = {tensor.name: tensor.size for tensor in operation.reads if tensor.grad}
    if operation.kind != "add":
        return needing
    handed = [name for name, size in needing.items() if size == operation.writes.size]
    return {
        name: Size() if name in handed[1:] else size for name, size in needing.items()
    }
