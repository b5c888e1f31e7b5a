"""The kernels of a step, and what each costs: the one list behind FLOPs, memory and time.

A piece of a model is a list of ``Operation``s on named ``Tensor``s, about one per ATen kernel. Each
knows its matrix products, what autograd keeps of it until the backward pass, and what it reads and
writes, so that FLOPs, bytes and seconds are three readings of the same list and cannot disagree.
Sizes grow with the tokens T = batch x sequence, those of attention maps also with the keys S; a few
are those of a weight:

    bytes = T (token + map S) + fixed

Where a gradient is needed, autograd's rules apply (PyTorch's derivatives.yaml): a matrix product
keeps its input only if its weight is trained; ``a * b`` keeps b if a needs a gradient; SiLU and
GELU keep their input; ReLU, tanh and softmax their output. What needs no gradient keeps nothing.

Limits: eager PyTorch, without torch.compile, fused kernels from the hub, or autocast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

from thrifty.costs.adapted import FORMS, adapted, scaled_input
from thrifty.costs.shape import LinearShape, ModelShape


class Size(NamedTuple):
    """Bytes per token, bytes per token and key, and bytes whatever the batch."""

    token: float = 0.0
    map: float = 0.0
    fixed: float = 0.0

    def at(self, tokens: Any, keys: Any) -> Any:
        """At these tokens and keys: numbers, or arrays of them."""
        return tokens * (self.token + self.map * keys) + self.fixed

    def times(self, factor: float) -> Size:
        return Size(self.token * factor, self.map * factor, self.fixed * factor)

    def of_tokens(self, share: float) -> Size:
        """Where a share of the tokens is there."""
        return Size(self.token * share, self.map * share, self.fixed)


def total(sizes: Iterable[Size]) -> Size:
    token = keyed = fixed = 0.0
    for of_token, of_map, of_all in sizes:
        token += of_token
        keyed += of_map
        fixed += of_all
    return Size(token, keyed, fixed)


class Tensor(NamedTuple):
    """A buffer; views of it are the same tensor."""

    name: str
    size: Size
    grad: bool = False
    """Whether a gradient flows into it."""


class Product(NamedTuple):
    """Matrix products of ``2 inner columns`` FLOPs a token; the rows are the tokens.

    With ``heads``, one of attention's two products in every head, where ``columns`` is per key:
    ``2 heads inner`` FLOPs a token and key. With ``rows`` one of weights alone, whatever the
    batch.
    """

    inner: int
    columns: int
    heads: int = 0
    rows: int = 0
    wide: bool = False
    """In float32 beside a model of fewer bits, as an adapter's are."""


@dataclass(frozen=True, slots=True)
class Operation:
    kind: str
    reads: tuple[Tensor, ...]
    writes: Tensor
    saves: tuple[Tensor, ...] = ()
    """What stays until this operation's backward."""
    packs: str = ""
    """When autograd packs a tensor of it, weights included: ``before`` it computes or ``after``."""
    forward: tuple[Product, ...] = ()
    backward: tuple[Product, ...] = ()
    weight_elements: int = 0
    trained: bool = False
    unpacks: float = 0.0
    """Bytes of the weight, made whole out of few bits for the forward and for the backward."""
    passes: tuple[float, float] = (1.0, 1.0)
    """Elementwise kernels of the forward and of the backward, each over about its output."""
    inside: tuple[Operation, ...] = ()
    """What runs for a ``share`` of the tokens at a time, and again in the backward."""
    share: float = 1.0
    summed: float = 0.0
    """Bytes of a weight's gradient inside, the largest: a slice's beside the sum of the others'."""


class Operations(tuple[Operation, ...]):
    """Those of a piece of the model. Equal only to itself: equal pieces are the same object, and
    dear to compare."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is trained beside the linears named by ``targets``, as PEFT runs it.

    Of LoRA: ``y = W x + B(A(x)) alpha / rank``. The other ``FORMS`` are in ``adapted.py``.
    ``targets`` None means the usual ones, ``layers`` None every layer. The dropout inside the
    adapter is taken to be 0.
    """

    rank: int = 16
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    form: str = "lora"
    start: str = ""
    """``pissa``: the weights give up what it begins with; ``loftq``: it begins with what few bits
    lost."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, not {self.rank}\nhint: try rank 16")
        if self.form not in FORMS:
            raise ValueError(
                f"there is no adapter {self.form!r}\nhint: there are {', '.join(FORMS)}"
            )

    @property
    def merged(self) -> bool:
        """Whether a run leaves it within the weights of a whole model."""
        return FORMS[self.form].merged

    @property
    def saved(self) -> Adapter:
        """As it is left for others: what the weights gave up has its own rank beside it."""
        return replace(self, rank=2 * self.rank, start="") if self.start == "pissa" else self

    @property
    def unfrozen(self) -> Adapter:
        """Where the gradients of all of it are asked for."""
        return replace(self, form="lora") if self.form == "lora_fa" else self

    def names(self, shape: ModelShape) -> tuple[str, ...]:
        """Of the linears that it is put on."""
        if self.targets is not None:
            return self.targets
        if self.form == "bottleneck":
            return shape.last_of_the_mlp
        return shape.ia3_targets if self.form == "ia3" else shape.lora_targets

    def adapts(self, shape: ModelShape, linear: LinearShape) -> bool:
        if self.form == "bottleneck" and linear.part != "mlp":  # of the same name, in attention
            return False
        return linear.name in self.names(shape)

    def check(self, shape: ModelShape) -> None:
        """Its targets and layers must exist in the model."""
        unknown = [name for name in self.targets or () if name not in shape.lora_targets]
        if unknown:
            raise ValueError(
                f"{shape.model_type} has no linear named {', '.join(unknown)}\n"
                f"hint: its linears are {', '.join(shape.lora_targets)}"
            )
        if any(not 0 <= index < shape.num_layers for index in self.layers or ()):
            raise ValueError(
                f"LoRA layers {self.layers} are not all among the model's {shape.num_layers}\n"
                f"hint: layers count from 0 to {shape.num_layers - 1}"
            )

    def linears(self, shape: ModelShape) -> list[LinearShape]:
        """Those that it is put on, in the order of the layers."""
        self.check(shape)
        layers = range(shape.num_layers) if self.layers is None else sorted(set(self.layers))
        return [
            linear
            for index in layers
            for linear in shape.linears_of(index)
            if self.adapts(shape, linear)
        ]

    def num_parameters(self, shape: ModelShape) -> int:
        """Frozen ones included."""
        return _num_parameters(shape, self)


@lru_cache(maxsize=512)
def _num_parameters(shape: ModelShape, adapter: Adapter) -> int:
    of_linear = FORMS[adapter.form].num_parameters
    return sum(of_linear(shape, linear, adapter.rank) for linear in adapter.linears(shape))


@dataclass(frozen=True, kw_only=True)
class Program:
    """A growing list of operations, following which tensors need a gradient."""

    shape: ModelShape
    itemsize: int = 4
    """Bytes of an element of the model."""
    adapter_itemsize: int = 4
    on_cpu: bool = True
    trained: bool = False
    """Whether the model's own weights here are trained."""
    adapter: Adapter | None = None
    masked: bool = False
    rotates: bool = True
    """This layer has a rotary embedding."""
    training: bool = True
    quantised: bool = False
    mlp_share: float = 0.0
    one_row: bool = False
    """The batch is a single row."""
    operations: list[Operation]

    def name(self) -> str:
        return str(len(self.operations))

    def emit(
        self,
        kind: str,
        reads: tuple[Tensor, ...],
        size: Size,
        *,
        grad: bool | None = None,
        **fields: Any,
    ) -> Tensor:
        """Appends an operation and returns what it writes."""
        grad = any(tensor.grad for tensor in reads) if grad is None else grad
        writes = Tensor(self.name(), size, grad)
        self.operations.append(Operation(kind, reads, writes, **fields))
        return writes

    def apply(
        self,
        kind: str,
        x: Tensor,
        *,
        keeps: str = "",
        share: float = 1.0,
        passes: tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:
        """A kernel of one input, which keeps nothing, its input or its output; ``share``: the size
        of its output in inputs."""
        writes = Tensor(self.name(), x.size.times(share), x.grad)
        kept = {"": (), "input": (x,), "output": (writes,)}[keeps] if x.grad else ()
        packs = {"input": "before", "output": "after"}.get(keeps, "") if x.grad else ""
        self.operations.append(Operation(kind, (x,), writes, kept, packs, passes=passes))
        return writes

    def hold(self, *tensors: Tensor) -> None:
        """Python variables keep these alive up to here."""
        reads = tuple(tensor._replace(grad=False) for tensor in tensors)
        self.emit("hold", reads, Size(), passes=(0.0, 0.0))

    def cast(self, x: Tensor, source: int, target: int) -> Tensor:
        return x if source == target else self.apply("cast", x, share=target / source)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise, the size of ``a``; of a larger ``b`` it reads a view."""
        kept = ((b,) if a.grad else ()) + ((a,) if b.grad else ())
        reads = (a, b._replace(size=min(a.size, b.size)))
        passes = (1.0, float(a.grad + b.grad))
        packs = "before" if kept else ""
        return self.emit("multiply", reads, a.size, saves=kept, packs=packs, passes=passes)

    def add(self, residual: Tensor, branch: Tensor) -> Tensor:
        """The sum. Its backward hands the same gradient to both; ``residual`` uses it last."""
        size = max(residual.size, branch.size)
        return self.emit("add", (residual, branch), size, passes=(1.0, 1.0))

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        if not (rate and self.training):
            return x
        # On a CPU autograd keeps the scaled noise in the model's dtype; CUDA keeps a byte.
        share = 1.0 if self.on_cpu else 1.0 / self.itemsize
        noise = self.emit("noise", (), x.size.times(share), grad=False)
        kept = (noise,) if x.grad else ()
        packs = "after" if x.grad else ""
        return self.emit("dropout", (x, noise), x.size, saves=kept, packs=packs)

    def product(
        self,
        x: Tensor,
        inputs: int,
        outputs: int,
        *,
        trained: bool,
        itemsize: int = 0,
        kept: tuple[Tensor, ...] = (),
        unpacks: float = 0.0,
    ) -> Tensor:
        """``[tokens, inputs] @ [inputs, outputs]``. Its backward needs the weight only to reach x,
        and x only for the weight's own gradient. ``kept``: a copy of the weight made for this."""
        grad, itemsize = x.grad or trained, itemsize or self.itemsize
        product = (Product(inputs, outputs, wide=itemsize > self.itemsize),)
        return self.emit(
            "linear",
            (x, *kept),
            Size(float(outputs * itemsize)),
            grad=grad,
            saves=((x,) if trained else ()) + (kept if x.grad else ()),
            packs="before" if grad else "",
            forward=product,
            backward=product * (x.grad + trained),
            weight_elements=inputs * outputs,
            trained=trained,
            unpacks=unpacks,
            passes=(0.0, 0.0),
        )

    def sliced(self, inside: list[Operation], x: Tensor, out: Tensor, share: float) -> Tensor:
        """``out``, which ``inside`` makes of ``x``, for a share of its tokens at a time. Of each
        slice ``x`` alone is kept; the slices are put together at the end."""
        grad, trained = out.grad, [each for each in inside if each.trained]
        again = recomputed(inside) if grad else ()
        itemsize = self.itemsize if self.trained else self.adapter_itemsize
        return self.emit(
            "slices",
            (x,),
            out.size,
            grad=grad,
            saves=(x,) if grad else (),
            packs="before" if grad else "",
            forward=tuple(product for each in inside for product in each.forward),
            backward=tuple(product for each in again for product in each.forward)
            + tuple(product for each in inside for product in each.backward),
            weight_elements=sum(each.weight_elements for each in trained),
            trained=bool(trained),
            # All but the first slice, which the operations themselves count.
            unpacks=(ceil(1 / share) - 1) * sum(each.unpacks for each in inside),
            inside=tuple(inside),
            share=share,
            summed=float(max((each.weight_elements for each in trained), default=0) * itemsize),
        )

    def experts_product(self, kind: str, x: Tensor, inputs: int, outputs: int, rows: int) -> Tensor:
        """``rows`` copies of each token, each through the matrix of one expert."""
        assert self.shape.experts is not None
        grad = x.grad or self.trained
        product = (Product(inputs, outputs * rows),)
        return self.emit(
            kind,
            (x,),
            Size(float(rows * outputs * self.itemsize)),
            grad=grad,
            saves=(x,) if self.trained else (),
            packs="before" if grad else "",
            forward=product,
            backward=product * (x.grad + self.trained),
            weight_elements=self.shape.experts.num_experts * inputs * outputs,
            trained=self.trained,
            passes=(0.0, 0.0),
        )

    def linear(self, linear: LinearShape, x: Tensor) -> Tensor:
        inputs, outputs = linear.in_features, linear.out_features
        unpacks = float(inputs * outputs * self.itemsize) if self.quantised else 0.0
        x = scaled_input(self, self.adapter, linear, x)
        out = self.product(x, inputs, outputs, trained=self.trained, unpacks=unpacks)
        if linear.bias and self.shape.bias_apart:
            out = self.apply("bias", out)
        if self.adapter is None or not self.adapter.adapts(self.shape, linear):
            return out
        return adapted(self, self.adapter, linear, x, out)

    def of_weights(self, kind: str, elements: int, itemsize: int, *reads: Tensor) -> Tensor:
        """What is made of weights alone, to which no gradient flows: of the same size whatever the
        batch."""
        return self.emit(kind, reads, Size(fixed=float(elements * itemsize)), grad=False)

    def weights_product(self, x: Tensor, inputs: int, outputs: int, *, rows: int) -> Tensor:
        """The same of a product, in the adapter's dtype."""
        size = Size(fixed=float(rows * outputs * self.adapter_itemsize))
        wide = self.adapter_itemsize > self.itemsize
        product = (Product(inputs, outputs, rows=rows, wide=wide),)
        return self.emit("linear", (x,), size, grad=False, forward=product, passes=(0.0, 0.0))

    def norm(self, x: Tensor, width: int, *, weighed: bool = True) -> Tensor:
        """A norm over groups of ``width`` elements: one for the hidden size, one a head for the
        queries and keys."""
        if self.shape.norm == "layer":
            grad = x.grad or self.trained
            statistics = Tensor(f"{self.name()} statistics", Size(2 * self.itemsize))
            kept = (x, statistics) if grad else ()
            packs = "after" if grad else ""
            passes = (1.0, 3.0)
            return self.emit(
                "layer_norm", (x,), x.size, grad=grad, saves=kept, packs=packs, passes=passes
            )
        wide = self.cast(x, self.itemsize, 4)
        if self.shape.norm == "bare":
            statistics = Tensor(f"{self.name()} statistics", Size(8.0))
            kept = (wide, statistics) if x.grad else ()
            packs = "after" if x.grad else ""
            normal = self.emit(
                "layer_norm", (wide,), wide.size, saves=kept, packs=packs, passes=(1.0, 2.0)
            )
            return self.cast(normal, 4, self.itemsize)
        square = self.apply("square", wide, keeps="input", passes=(1.0, 3.0))
        mean = self.apply("mean", square, share=1.0 / width)
        inverse = self.apply("rsqrt", mean, keeps="output", passes=(2.0, 3.0))
        normal = self.multiply(wide, inverse)
        if not weighed:
            return self.cast(normal, 4, self.itemsize)
        if self.shape.norm == "wide":
            return self.cast(self.weigh(normal), 4, self.itemsize)
        return self.weigh(self.cast(normal, 4, self.itemsize))

    def weigh(self, x: Tensor) -> Tensor:
        """Times the weight vector of a norm."""
        grad = x.grad or self.trained
        kept = (x,) if self.trained else ()
        passes = (1.0, x.grad + 2.0 * self.trained)
        packs = "before" if grad else ""
        return self.emit("weigh", (x,), x.size, grad=grad, saves=kept, packs=packs, passes=passes)


def saved(operations: Sequence[Operation]) -> dict[str, Tensor]:
    """The distinct tensors that autograd keeps of these operations; a view keeps its buffer."""
    written = {each.writes.name: each.writes for each in operations}
    kept: dict[str, Tensor] = {}
    for operation in operations:
        for tensor in operation.saves:
            kept[tensor.name] = written.get(tensor.name, tensor)
    return kept


def recomputed(operations: Sequence[Operation]) -> Sequence[Operation]:
    """What a checkpointed layer runs again: everything up to the last tensor that is packed."""
    packing = [index for index, each in enumerate(operations) if each.packs]
    if not packing:
        return ()
    last = packing[-1]
    return operations[: last + (operations[last].packs == "after")]
