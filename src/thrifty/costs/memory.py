"""Bytes held at the peak of a training step, per phase and per term.

A step has three phases, and its peak is the largest of them, never their sum:

    loss       weights + optimizer + activations of all layers + logits in float32 (about 12 V T)
    backward   weights + optimizer + gradients so far + activations not yet consumed + temporaries
    optimizer  weights + optimizer + gradients + what the optimizer allocates

What autograd keeps of each layer, and which buffers live beside it, is read off the layer's
operations (``layer.py``, ``liveness.py``), so that recomputation, adapters, masks, dropout and
dtypes need no rules of their own here. For T tokens, a bf16 Llama layer without a mask comes to the
known T (20 h + 4 kv + 8 f + 4 a + 8).

Counted are bytes that PyTorch allocates. Not counted: what the allocator reserves on top, files in
the page cache, data loader workers. On a CPU the resident set also holds ``RUNTIME_BYTES`` and,
with glibc's default malloc, 12-24% of fragmentation (none with MALLOC_MMAP_THRESHOLD_=65536).

Limits: AdamW; one device; no autocast (the model itself has ``dtype``), quantisation or offload.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from thrifty.costs.layer import Setup
from thrifty.costs.liveness import Piece, Point, highest, pieces
from thrifty.costs.operations import Adapter, Size
from thrifty.costs.shape import ITEMSIZE, LinearShape, ModelShape

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


def account(shape: ModelShape, setting: MemorySetting) -> MemoryAccount:
    """Bytes of one training step in steady state: optimizer states exist from its start."""
    step = _Step(shape, setting)
    return MemoryAccount(
        phases={"loss": step.loss(), "backward": step.backward(), "optimizer": step.optimizer()}
    )


class _Step:
    """The amounts that the phases of a training step share."""

    def __init__(self, shape: ModelShape, setting: MemorySetting) -> None:
        self.shape, self.setting = shape, setting
        self.setup = setup_of(shape, setting)
        self.tokens, self.keys = setting.tokens, setting.sequence
        self.states = _states(shape, setting)
        self.itemsize = trained_itemsize(setting)
        self.gradients = num_trained(shape, setting) * self.itemsize
        # While gradients accumulate all exist, and a new one lives until it is added to the old.
        self.accumulating = setting.gradient_accumulation_steps > 1
        self.first, *self.body, self.last = pieces(shape, self.setup)
        self.input_bytes = float(shape.hidden_size * self.setup.itemsize * self.tokens)
        self.before = self.bytes(self.first.saved) + self.bytes(_shared(shape, self.setup))

    def bytes(self, size: Size) -> float:
        return size.at(self.tokens, self.keys)

    def stored(self, piece: Piece) -> float:
        """What a layer leaves after its forward: all it saves, or its input to recompute from."""
        return self.input_bytes if self.setting.recompute else self.bytes(piece.saved)

    def highest(self, points: Iterable[Point]) -> Point:
        done, fresh = (0.0, self.itemsize) if self.accumulating else (self.itemsize, 0.0)
        return highest(points, self.tokens, self.keys, done, fresh)

    def phase(
        self, weight_elements: float, activations: float, point: Point, *, of_head: bool = False
    ) -> dict[str, float]:
        """The terms at an instant after the backward has left ``weight_elements`` gradients."""
        kept, beside = self.bytes(point.kept), self.bytes(point.beside)
        done = (weight_elements + point.done) * self.itemsize
        fresh = point.fresh * self.itemsize if self.accumulating else 0.0
        return self.states | {
            "gradients": self.gradients if self.accumulating else done,
            "activations": activations + (0.0 if of_head else kept),
            "logits": kept + beside if of_head else 0.0,
            "temporaries": BATCH_BYTES * self.tokens + fresh + (0.0 if of_head else beside),
        }

    def loss(self) -> dict[str, float]:
        """The end of the forward and the start of the backward, or the last layer's forward."""
        layers = self.before + sum(self.stored(piece) for piece in self.body)
        point = self.highest((*self.last.forward, *self.last.backward))
        head = self.phase(0.0, layers, point, of_head=True)
        if self.setting.recompute:
            return head
        top = self.body[-1]
        point = self.highest(top.forward)
        return _larger(head, self.phase(0.0, layers - self.stored(top), point))

    def backward(self) -> dict[str, float]:
        """From the last layer down, each leaving its weights' gradients; then the embedding."""
        distinct = {id(piece): piece for piece in self.body}
        again = self.setting.recompute
        points = {
            key: self.highest(piece.recompute if again else piece.backward)
            for key, piece in distinct.items()
        }
        best: dict[str, float] = {}
        activations = self.before + sum(self.stored(piece) for piece in self.body)
        done = self.last.weight_elements
        for piece in reversed(self.body):
            activations -= self.stored(piece)
            stored = self.input_bytes if again else 0.0
            best = _larger(best, self.phase(done, activations + stored, points[id(piece)]))
            done += piece.weight_elements
        if not self.setup.trains_all:
            return best
        # The embedding's gradient is dense. Tied to the head it is added to the head's, whose sum
        # is a third buffer; while gradients accumulate there is the old one too.
        copies = (2.0 if self.shape.tie_word_embeddings else 0.0) + self.accumulating
        end = self.phase(0.0, 0.0, Point())
        end["gradients"] = self.gradients
        end["temporaries"] += copies * self.shape.head_parameters * self.itemsize + self.input_bytes
        return _larger(best, end)

    def optimizer(self) -> dict[str, float]:
        end = self.phase(0.0, 0.0, Point())
        end["gradients"] = self.gradients
        end["temporaries"] += _optimizer_temporaries(self.shape, self.setting, self.gradients)
        return end


def _larger(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return max(one, other, key=lambda terms: sum(terms.values()))


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
    for phase, instants in points.items():
        most = highest(instants, setting.tokens, sequence).beside.at(setting.tokens, sequence)
        masks = _shared(shape, setup, held=phase == "layers").at(setting.tokens, sequence)
        phases[phase] = dict.fromkeys(TERMS, 0.0) | {
            "weights": weights,
            "activations" if phase == "layers" else "logits": most,
            "temporaries": held + masks,
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
    weights = num_trained(shape, setting) * trained_itemsize(setting)
    return weights * (1.0 + OPTIMIZER_STATES[setting.optimizer])


def saved_bytes(shape: ModelShape, setting: MemorySetting, *, head: bool = True) -> float:
    """What autograd keeps at the end of the forward, with or without what the head keeps."""
    step = _Step(shape, setting)
    kept = step.before + sum(step.stored(piece) for piece in step.body)
    return kept + (step.bytes(step.last.saved) if head else 0.0)


def setup_of(shape: ModelShape, setting: MemorySetting, *, backward: bool = True) -> Setup:
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


def num_trained(shape: ModelShape, setting: MemorySetting) -> int:
    """Elements that get a gradient."""
    return (
        shape.num_parameters if setting.adapter is None else setting.adapter.num_parameters(shape)
    )


def trained_itemsize(setting: MemorySetting) -> int:
    return ITEMSIZE[setting.dtype if setting.adapter is None else setting.adapter_dtype]


def _states(shape: ModelShape, setting: MemorySetting) -> dict[str, float]:
    """The terms that hold whatever the batch."""
    trained = float(num_trained(shape, setting) * trained_itemsize(setting))
    return dict.fromkeys(TERMS, 0.0) | {
        "weights": float(shape.num_parameters * ITEMSIZE[setting.dtype]),
        "adapter": 0.0 if setting.adapter is None else trained,
        "optimizer_states": trained * OPTIMIZER_STATES[setting.optimizer],
    }


def _optimizer_temporaries(shape: ModelShape, setting: MemorySetting, gradients: float) -> float:
    """Unfused AdamW: on CUDA (foreach) a copy of everything, on a CPU two of the largest tensor."""
    if setting.fused:
        return 0.0
    if setting.device_kind == "cuda":
        return gradients
    if setting.adapter is not None:
        widest = max(max(each.in_features, each.out_features) for each in _linears(shape))
        return 2.0 * setting.adapter.rank * widest * ITEMSIZE[setting.adapter_dtype]
    largest = max(each.in_features * each.out_features for each in _linears(shape))
    if shape.experts is not None:
        expert = shape.hidden_size * 2 * shape.experts.intermediate_size
        largest = max(largest, shape.experts.num_experts * expert)
    return 2.0 * max(largest, shape.head_parameters) * ITEMSIZE[setting.dtype]


def _linears(shape: ModelShape) -> tuple[LinearShape, ...]:
    return shape.linears + shape.mixture_linears


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
