"""One way to run a training step, in plain numbers: all that decides its bytes.

Memory techniques (``thrifty/memory/``) rewrite a setting; ``costs/memory.py`` evaluates it, since
what they save does not add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from thrifty.costs.blocks import Block, Blocks
from thrifty.costs.layer import Setup
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ITEMSIZE, LinearShape, ModelShape

DEVICE_KINDS = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the frozen linears of the layers lie in memory: fewer bits, made whole for each use."""

    name: str
    bits: float
    """Of a weight, the scales of its blocks included."""
    row_bytes: float = 0.0
    """Of the scale of an output row."""

    def bytes_of(self, linear: LinearShape) -> float:
        elements = linear.in_features * linear.out_features
        return elements * self.bits / 8 + self.row_bytes * linear.out_features


@dataclass(frozen=True, kw_only=True)
class States:
    """What an optimizer keeps of a trained tensor, and what its step allocates beside.

    For a matrix of m x n elements of ``itemsize`` bytes, n the larger,

        m n (relative itemsize + absolute) + edge (m + n)

    or, with a rank r < m, (2 r n + m r) itemsize, the embedding and the head apart, which are not
    projected; for a vector ``vector`` bytes an element, where given.
    """

    name: str
    relative: float = 0.0
    absolute: float = 0.0
    edge: float = 0.0
    rank: int = 0
    """Moments of the gradient projected to this rank, and the projector."""
    projector: bool = True
    """False: the projector is made anew from a seed."""
    low: tuple[float, float] | None = None
    """Bytes an element of such a moment and of the projector, where it is not the weight's."""
    vector: float | None = None
    wide_embedding: float = 0.0
    """Bytes an element of the embedding keeps instead, where it is treated apart; a head that is
    not tied to it is not."""
    step_all: float = 0.0
    """Copies of all that is trained, which the step makes; 1 for AdamW's ``foreach`` on CUDA."""
    step_largest: float = 0.0
    """Bytes an element of the largest trained tensor."""
    step_casts: float = 0.0
    """Float32 copies of it, where it is narrower itself."""
    step_cpu: float = 0.0
    """Bytes an element of it on a CPU, where the library has no fused kernel there."""
    step_cpu_casts: float = 0.0
    """Float32 copies beside these, where it is narrower."""
    moved: float = 7.0
    """Times that the trained weights' bytes go through memory in a step."""
    cpu_factor: float = 1.0
    """How much longer than that a step takes on a CPU, where its kernels are made for GPUs."""

    def matrix_bytes(self, rows: int, columns: int, itemsize: int) -> float:
        small, large = sorted((rows, columns))
        if self.rank and self.rank < small:
            moment, projector = self.low or (itemsize, itemsize)
            projected = 2.0 * self.rank * large * moment
            return projected + self.projector * small * self.rank * projector
        return self.table_bytes(rows, columns, itemsize)

    def table_bytes(self, rows: int, columns: int, itemsize: int) -> float:
        """Of the head, and of the embedding where it is not wide."""
        elements = rows * columns * (self.relative * itemsize + self.absolute)
        return elements + self.edge * (rows + columns)

    def vector_bytes(self, elements: int, itemsize: int) -> float:
        if self.vector is not None:
            return self.vector * elements
        return elements * (self.relative * itemsize + self.absolute)


ADAMW = States(name="adamw", relative=2.0)
"""Two moments in the weight's dtype, as ``torch.optim.AdamW`` keeps them."""


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """One way to run the training step."""

    micro_batch: int = 1
    sequence: int = 1024
    """Tokens of a row, padding included."""
    dtype: str = "bfloat16"
    """Of the model's weights; gradients and AdamW's states follow it."""
    masked: bool = True
    """Attention gets a mask: rows are packed with several documents, or padded."""
    gradient_accumulation_steps: int = 1
    device_kind: str = "cpu"
    num_devices: int = 1
    """Over which weights, gradients and states are sharded (FSDP), a layer gathered at a time."""
    replicas: int = 1
    """Devices that each hold all of it and add up their gradients (DDP)."""

    # what is trained: all weights, unless one of these says otherwise
    adapter: Adapter | None = None
    adapter_dtype: str = "float32"
    """PEFT keeps adapters in float32 unless told otherwise."""
    blocks: Blocks | None = None
    """These take turns; at one turn the next three say which it is."""
    only_layers: frozenset[int] | None = None
    """The weights of these layers alone."""
    with_embedding: bool = False
    """Of the embedding beside them."""
    with_head: bool = False
    """Of the final norm and the head beside them."""
    only_head: bool = False
    zeroth_order: bool = False
    """Two forwards and no backward (MeZO)."""
    short: int = 0
    """Tokens of a pack more that each row has, which alone gets a backward; the other, of
    ``sequence``, gets two forwards (Addax). 0: a row is one pack."""
    reference: bool = False
    """A frozen copy is asked as well, as preference training does; under an adapter it is the model
    without it."""

    # how it is held
    storage: Storage | None = None
    """Of the frozen linears; None: as they are."""
    layers_on_host: bool = False
    """The frozen layers wait on the host; one at a time is on the device."""
    states: States = ADAMW
    states_offloaded: bool = False
    """They live on the host."""
    fused: bool = True
    """``adamw_torch_fused``. Unfused AdamW allocates more: on CUDA a copy of what it trains."""
    in_backward: bool = False
    """A weight is updated as soon as its gradient is there, which is then dropped."""

    # activations and loss
    recompute: int = 0
    """Every how many layers one is run again in the backward; 0: none, 1 (or True): all."""
    selective: bool = False
    """Of those, the outputs of products and attention are kept."""
    offload: bool = False
    """What is kept from the forward to the backward waits on the host."""
    mlp_chunk: int = 0
    """Tokens of a row whose MLP runs at a time, and again in the backward; 0: all, once."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time; 0: all."""
    loss_fused: bool = False
    """Their gradient is made with them, in the forward; else they are made again for it."""
    holds_logits: bool = False
    """The model's output, so its logits, stays alive during the backward."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "sequence", "gradient_accumulation_steps", "num_devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1\nhint: leave it out for the default")
        for name in ("dtype", "adapter_dtype"):
            if getattr(self, name) not in ITEMSIZE:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known\nhint: use {', '.join(ITEMSIZE)}"
                )
        if self.device_kind not in DEVICE_KINDS:
            raise ValueError(
                f"device kind {self.device_kind!r} is not known\nhint: use cpu or cuda"
            )
        if self.storage is not None and (reason := only_frozen(self, self.storage.name)):
            raise ValueError(f"{reason}\nhint: train an adapter on them")
        if self.in_backward and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "gradients that are used up in the backward cannot be accumulated\n"
                "hint: gradient_accumulation_steps 1 and a larger micro-batch, or another optimizer"
            )

    def changed(self, **fields: Any) -> MemorySetting:
        """``dataclasses.replace`` in a tenth of its time: a search makes thousands."""
        assert fields.keys() <= self.__dict__.keys(), fields
        setting = object.__new__(MemorySetting)
        setting.__dict__.update(self.__dict__, **fields)
        setting.__post_init__()
        return setting

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence

    @property
    def row_tokens(self) -> int:
        """Of all packs of a row."""
        return self.sequence + self.short

    @property
    def trained_shards(self) -> int:
        """Devices over which what is trained is sharded; an adapter is whole on each."""
        return self.num_devices if self.adapter is None else 1

    @property
    def num_ranks(self) -> int:
        """Devices that work on a step, each on a micro-batch of its own."""
        return self.num_devices * self.replicas

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the model."""
        return ITEMSIZE[self.dtype]

    @property
    def trained_itemsize(self) -> int:
        """Bytes of an element of what is trained."""
        return self.itemsize if self.adapter is None else ITEMSIZE[self.adapter_dtype]


def at_turn(setting: MemorySetting, block: Block) -> MemorySetting:
    """The steps of one turn of ``setting.blocks``."""
    return setting.changed(
        only_layers=block.layers,
        with_embedding=block.embedding,
        with_head=block.head,
    )


def parts_of(setting: MemorySetting) -> tuple[MemorySetting, ...]:
    """The passes of a micro-batch, each held as a step of its own would be: of the short packs with
    a backward, then of the others without; or one."""
    if not setting.short:
        return (setting,)
    first = setting.changed(sequence=setting.short, short=0)
    # Nothing is kept, so that nothing is made again or put away.
    zeroth = setting.changed(
        short=0,
        zeroth_order=True,
        in_backward=False,
        recompute=0,
        selective=False,
        offload=False,
        mlp_chunk=0,
        loss_fused=False,
    )
    return first, zeroth


def takes_turns(setting: MemorySetting) -> Blocks | None:
    """What takes turns over the steps of a setting; None at one turn, and where nothing does."""
    return setting.blocks if setting.only_layers is None else None


def setup_of(
    shape: ModelShape,
    setting: MemorySetting,
    *,
    backward: bool = True,
    one_row: bool | None = None,
) -> Setup:
    """What of a setting decides which kernels run; ``one_row``: of a micro-batch of one, where it
    is not the setting's own."""
    backward = backward and not setting.zeroth_order
    one_row = setting.micro_batch == 1 if one_row is None else one_row
    return Setup(
        itemsize=setting.itemsize,
        adapter_itemsize=ITEMSIZE[setting.adapter_dtype],
        on_cpu=setting.device_kind == "cpu",
        adapter=setting.adapter,
        only_layers=setting.only_layers,
        with_embedding=setting.with_embedding,
        with_head=setting.with_head,
        only_head=setting.only_head,
        recompute=bool(setting.recompute),
        quantised=setting.storage is not None,
        mlp_share=min(1.0, setting.mlp_chunk / setting.sequence) if backward else 0.0,
        backward=backward,
        training=backward,
        # A mask that the caller has to give is given also where it hides nothing but the future.
        masked=setting.masked or shape.mask == "given",
        one_row=shape.attention == "math" and one_row,
        window_masked=0 < shape.sliding_window <= setting.sequence,
    )


def only_frozen(setting: MemorySetting, what: str) -> str | None:
    """Why weights in few bits cannot be combined with a setting that trains or changes them."""
    if setting.adapter is not None and setting.adapter.start == "pissa":
        return f"it changes the weights to begin with, which {what} cannot follow"
    if setting.adapter is not None:
        return None
    if setting.zeroth_order or setting.short:
        return (
            f"a zeroth-order step moves the weights themselves, by less than {what} can tell apart"
        )
    return f"weights in {what} cannot be trained themselves, only adapters on them"


def widened_by_vectors(setting: MemorySetting) -> str | None:
    """Why bitsandbytes' linears, which put out bf16, cannot be scaled by vectors in float32."""
    if setting.adapter is None or setting.adapter.form != "ia3":
        return None
    if setting.adapter_dtype == "bfloat16":
        return None
    return "its vectors in float32 widen keys and values alone; give ia3 adapter_dtype bfloat16"


def only_in_full(setting: MemorySetting) -> str | None:
    """Why an adapter cannot begin on weights that are held in full."""
    if setting.adapter is not None and setting.adapter.start == "loftq":
        return "it begins with what 4 bits lose of the weights, and these lose nothing"
    return None


def needs_a_gradient(setting: MemorySetting) -> str | None:
    """Why an optimizer with states cannot be combined with a setting that makes no gradient."""
    if setting.zeroth_order or setting.short:
        return "a zeroth-order update is plain descent, without states"
    return None


def read_in(setting: MemorySetting) -> Literal["float32", "bfloat16"]:
    """In which dtype the base model is read by what looks at it besides training."""
    return "bfloat16" if setting.dtype == "bfloat16" else "float32"


def too_narrow(shape: ModelShape, rank: int) -> str | None:
    """Why no gradient of this model can be projected to ``rank``."""
    layers = range(shape.num_layers)
    linears = (linear for index in layers for linear in shape.linears_of(index))
    widest = max((min(each.in_features, each.out_features) for each in linears), default=0)
    if shape.experts is None and widest <= rank:
        return (
            f"no matrix of a layer is wider than rank {rank} on both sides: the widest is {widest}"
        )
    return None


def needs_wide_matrices(setting: MemorySetting, rank: int) -> str | None:
    """Why gradients cannot be projected to ``rank``: an adapter's matrices, m x r and r x n, are no
    wider on their smaller side, so that nothing would be saved."""
    if setting.adapter is not None and setting.adapter.rank <= rank:
        return (
            f"matrices of rank {setting.adapter.rank}, as adapters are, have no rank {rank} in them"
        )
    return needs_a_gradient(setting)
