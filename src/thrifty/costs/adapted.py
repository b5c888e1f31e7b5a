"""What an adapted linear executes, as PEFT runs each form of adapter on a frozen one.

With a linear W, m x n, of T tokens x, and the scale s = alpha / rank,

    lora      y = W x + s B A x
    lora_fa   the same with A frozen: x is not kept, only A x is
    dora      y = (g / |W + s B A|) (W x + s B A x), the norms, one a row, made anew each time
    adalora   y = W x + s B (E A) x, E diagonal, and a pull of A A' and B' B towards 1
    ia3       y = l * W x, of the mlp's last linear y = W (l * x)

and beside the whole mlp, counted at its last linear and run in ``mlp.py``,

    bottleneck    y = mlp(x) + U (act(G x) * (D x))

DoRA's norms take the matrices I (n x n), A I, B A I, s B A and W + s B A whole, in the adapter's
dtype, and 2 n r (n + m) FLOPs whatever the batch. PEFT keeps adapters in float32 unless told
otherwise, casts the input of each adapted linear on its own, and autograd keeps every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thrifty.costs.shape import LinearShape, ModelShape

if TYPE_CHECKING:
    from thrifty.costs.operations import Adapter, Program, Tensor


def adapted(p: Program, adapter: Adapter, linear: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    """``out``: what the linear itself makes of ``x``; but (IA)3 may change what it reads."""
    return FORMS[adapter.form].run(p, adapter, linear, x, out)


def scaled_input(p: Program, adapter: Adapter | None, linear: LinearShape, x: Tensor) -> Tensor:
    """What the linear reads: ``x`` unless (IA)3 scales it."""
    if adapter is None or not (adapter.form == "ia3" and adapter.adapts(p.shape, linear)):
        return x
    if not scales_input(p.shape, linear):
        return x
    wide = p.cast(x, p.itemsize, max(p.adapter_itemsize, p.itemsize))
    return _times_vector(p, wide, wide, linear.in_features)


def scales_input(shape: ModelShape, linear: LinearShape) -> bool:
    """Whether (IA)3 scales what a linear reads, and not what it makes."""
    return linear.name in shape.last_of_the_mlp


def _low_rank(p: Program, adapter: Adapter, linear: LinearShape, wide: Tensor) -> Tensor:
    """B A x."""
    size, trains_a = p.adapter_itemsize, adapter.form != "lora_fa"
    low = p.product(wide, linear.in_features, adapter.rank, trained=trains_a, itemsize=size)
    return p.product(low, adapter.rank, linear.out_features, trained=True, itemsize=size)


def _sum(p: Program, out: Tensor, high: Tensor) -> Tensor:
    """In the wider of both dtypes."""
    widest = max(p.adapter_itemsize, p.itemsize)
    # A CPU kernel of mixed dtypes makes a wide copy first, CUDA does not.
    same = p.cast(out, p.itemsize, widest) if p.on_cpu else out
    return p.add(same, high)


def _lora(p: Program, adapter: Adapter, linear: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    wide = p.cast(x, p.itemsize, p.adapter_itemsize)
    high = p.apply("scale", _low_rank(p, adapter, linear, wide))
    both = _sum(p, out, high)
    p.hold(x, wide, out)
    return p.cast(both, max(p.adapter_itemsize, p.itemsize), p.itemsize)


def _dora(p: Program, adapter: Adapter, linear: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    size, widest = p.adapter_itemsize, max(p.adapter_itemsize, p.itemsize)
    wide = p.cast(x, p.itemsize, size)
    norms, held = _norms(p, adapter, linear)
    rows = linear.out_features
    scale = p.emit(
        "divide", (norms,), norms.size, grad=True, saves=(norms,), packs="before",
        weight_elements=rows, trained=True,
    )  # fmt: skip
    high = _low_rank(p, adapter, linear, wide)
    plain = p.apply("bias", out) if linear.bias else out
    one = p.apply("scale", scale)
    same = p.cast(plain, p.itemsize, widest) if p.on_cpu else plain
    kept = (plain, one) if plain.grad else (plain,)
    first = p.emit(
        "weigh", (same, one), same.size.times(widest * rows / max(same.size.token, 1.0)),
        saves=kept, packs="before", passes=(1.0, 3.0),
    )  # fmt: skip
    second = p.emit(
        "weigh", (high, scale), high.size, saves=(high, scale), packs="before", passes=(1.0, 3.0)
    )
    third = p.apply("scale", second)
    extra = p.add(first, third)
    p.hold(*held, plain, high)
    both = _sum(p, out, extra)
    p.hold(x, wide, out)
    return p.cast(both, widest, p.itemsize)


def _norms(p: Program, adapter: Adapter, linear: LinearShape) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of the rows of W + s B A, and what is held of it until the linear is done."""
    n, m, rank, size = linear.in_features, linear.out_features, adapter.rank, p.adapter_itemsize
    identity = p.of_weights("identity", n * n, size)
    thin = p.weights_product(identity, n, rank, rows=n)
    update = p.weights_product(thin, rank, m, rows=n)
    whole: tuple[Tensor, ...] = ()
    if p.quantised:
        whole = (p.of_weights("unpack", m * n, p.itemsize),)
    if p.itemsize != size:
        whole = (p.of_weights("cast", m * n, size, *whole),)
    scaled = p.of_weights("scale", m * n, size, update)
    both = p.of_weights("add", m * n, size, scaled, *whole)
    return p.of_weights("norm", m, size, both), (identity, thin, update, *whole)


def _adalora(p: Program, adapter: Adapter, linear: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    size, n, m, rank = p.adapter_itemsize, linear.in_features, linear.out_features, adapter.rank
    wide = p.cast(x, p.itemsize, size)
    scaled = p.of_weights("multiply", rank * n, size)._replace(grad=True)
    low = p.product(wide, n, rank, trained=True, itemsize=size, kept=(scaled,))
    high = p.product(low, rank, m, trained=True, itemsize=size)
    # By a number that PEFT keeps as a tensor, which autograd packs.
    high = p.emit("scale", (p.apply("scale", high),), high.size, packs="before")
    # In place, so that what it makes is the linear's own buffer.
    both = p.emit("add", (out, high), out.size)
    p.hold(x, wide, out)
    return both


def _ia3(p: Program, adapter: Adapter, linear: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    if scales_input(p.shape, linear):
        return out
    widest = max(p.adapter_itemsize, p.itemsize)
    same = p.cast(out, p.itemsize, widest) if p.on_cpu else out
    return _times_vector(p, same, out, linear.out_features)


def _times_vector(p: Program, x: Tensor, kept: Tensor, width: int) -> Tensor:
    """``x`` times a trained vector, in the wider of both dtypes, and back; ``kept``: of which ``x``
    may be a copy that a kernel makes for itself."""
    widest = max(p.adapter_itemsize, p.itemsize)
    wide = p.emit(
        "weigh", (x,), kept.size.times(max(1.0, x.size.token / kept.size.token)), grad=True,
        saves=(kept,), packs="before", weight_elements=width, trained=True,
        passes=(1.0, 2.0 + x.grad),
    )  # fmt: skip
    p.hold(kept)
    return p.cast(wide, widest, p.itemsize)


@dataclass(frozen=True)
class Form:
    """A kind of adapter; the counts are of one linear."""

    run: Callable[[Program, Adapter, LinearShape, Tensor, Tensor], Tensor]
    matrices: Callable[[ModelShape, LinearShape, int], tuple[tuple[int, int], ...]]
    """Trained, (rows, columns)."""
    vector: Callable[[ModelShape, LinearShape, int], int] = lambda shape, linear, rank: 0
    """Elements of what else is trained."""
    frozen: Callable[[LinearShape, int], int] = lambda linear, rank: 0
    """Elements of what is not."""
    averages: float = 0.0
    """Numbers that are kept of a trained element beside the optimizer's states."""
    merged: bool = False
    """A run leaves a whole model with the adapter in its weights, and not the adapter alone."""

    def num_trained(self, shape: ModelShape, linear: LinearShape, rank: int) -> int:
        matrices = sum(rows * columns for rows, columns in self.matrices(shape, linear, rank))
        return matrices + self.vector(shape, linear, rank)

    def num_parameters(self, shape: ModelShape, linear: LinearShape, rank: int) -> int:
        return self.num_trained(shape, linear, rank) + self.frozen(linear, rank)


def _plain(p: Program, adapter: Adapter, linear: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    return out


def _both(shape: ModelShape, linear: LinearShape, rank: int) -> tuple[tuple[int, int], ...]:
    return (linear.in_features, rank), (rank, linear.out_features)


def _around(shape: ModelShape, linear: LinearShape, rank: int) -> tuple[tuple[int, int], ...]:
    into = (linear.out_features, rank)  # what the mlp reads is as wide as what it puts out
    return (*(into,) * (2 if shape.gated else 1), (rank, linear.out_features))


def _scaled_width(shape: ModelShape, linear: LinearShape, rank: int) -> int:
    return linear.in_features if scales_input(shape, linear) else linear.out_features


FORMS: Mapping[str, Form] = {
    "lora": Form(_lora, _both),
    "lora_fa": Form(
        _lora,
        lambda shape, linear, rank: ((rank, linear.out_features),),
        frozen=lambda linear, rank: rank * linear.in_features,
    ),
    "dora": Form(_dora, _both, lambda shape, linear, rank: linear.out_features),
    "adalora": Form(_adalora, _both, lambda shape, linear, rank: rank, averages=2.0),
    "ia3": Form(_ia3, lambda shape, linear, rank: (), _scaled_width),
    "bottleneck": Form(_plain, _around, merged=True),
}


def regularising_flops(shape: ModelShape, adapter: Adapter | None) -> float:
    """Of AdaLoRA's A A' and B' B and of their gradients, once a step whatever the batch."""
    if adapter is None or adapter.form != "adalora":
        return 0.0
    widths = (each.in_features + each.out_features for each in adapter.linears(shape))
    return 4.0 * adapter.rank**2 * sum(widths)
