"""What a mixture of experts executes, as transformers 5.x runs it by default (``grouped_mm``).

Each token is copied to the k experts that the router chose for it, sorted by expert; two grouped
products run over the sorted rows, and the results are weighed, put back in order and summed. So a
layer with experts keeps k times what a gated mlp keeps, and the copies on top:

    T k (2 h + 4 inner + 2 inner + 2 inner + 2 h) bytes in bf16, and some indices,

whatever the router decides, since no token is dropped. An expert that every token shares runs
beside them as ordinary linears, behind a gate of its own in Qwen2-MoE.
"""

from __future__ import annotations

from collections.abc import Sequence

from thrifty.costs.every_expert import every_expert
from thrifty.costs.operations import Program, Size, Tensor
from thrifty.costs.shape import Experts, LinearShape

INDEX_BYTES = 8.0


def mixture_of_experts(p: Program, x: Tensor) -> Tensor:
    mixture = p.shape.experts
    assert mixture is not None
    if mixture.router == "every":
        scaled, out = every_expert(p, mixture, x)
        shared = _shared(p, mixture.shared, x)
        routed = p.add(shared, p.apply("sum", out, share=1.0 / mixture.num_experts))
        p.hold(x, scaled, out)
        return routed
    gates, linears = mixture.shared[:-3], mixture.shared[-3:]
    if gates:  # it runs before the others, and its output waits for them
        shared = _shared(p, linears, x)
        routed = _routed(p, mixture, x, _router(p, mixture, x))
        routed = p.add(routed, _gate(p, gates[0], x, shared))
    else:
        routed = _routed(p, mixture, x, _router(p, mixture, x))
        if linears:
            routed = p.add(routed, _shared(p, linears, x))
    p.hold(x)
    return routed


def _router(p: Program, mixture: Experts, x: Tensor) -> Tensor:
    """The weights of a token's experts."""
    chosen = mixture.num_active
    wide = mixture.router in ("wide", "sigmoid")
    if wide:
        x = p.cast(x, p.itemsize, 4)
    size = 4 if wide else p.itemsize
    elements = p.shape.hidden_size * mixture.num_experts
    weight: tuple[Tensor, ...] = ()
    if wide and p.itemsize != 4:  # the weight is made float32 for it, and kept to reach x
        weight = (p.emit("cast", (), Size(fixed=4.0 * elements), grad=p.trained),)
    logits = p.product(
        x, p.shape.hidden_size, mixture.num_experts, trained=p.trained, itemsize=size, kept=weight
    )
    if mixture.router == "raw":
        best = _best(p, logits, chosen)
        return p.apply("softmax", best, keeps="output", passes=(2.0, 2.0))
    scores = p.cast(logits, size, 4)
    kind = "sigmoid" if mixture.router == "sigmoid" else "softmax"
    scores = p.apply(kind, scores, keeps="output", passes=(2.0, 2.0))
    if mixture.groups and kind == "softmax":
        # The other groups' scores are masked. With a sigmoid that is done to a copy, not kept.
        mask = Tensor(f"{p.name()} mask", Size(float(mixture.num_experts)))
        scores = p.emit("mask", (scores,), scores.size, saves=(mask,) if scores.grad else ())
    weights = _best(p, scores, chosen)
    if mixture.normalised:
        total = p.apply("sum", weights, share=1.0 / chosen)
        weights = p.emit("divide", (weights, total), weights.size, saves=(weights, total))
    if mixture.scaled:
        weights = p.apply("scale", weights)
    return weights if mixture.wide_weights else p.cast(weights, 4, p.itemsize)


def _best(p: Program, scores: Tensor, chosen: int) -> Tensor:
    """The ``chosen`` largest, whose places autograd keeps."""
    assert p.shape.experts is not None
    places = Tensor(f"{p.name()} places", Size(INDEX_BYTES * chosen))
    size = scores.size.times(chosen / p.shape.experts.num_experts)
    return p.emit("topk", (scores,), size, saves=(places,) if scores.grad else ())


def _routed(p: Program, mixture: Experts, x: Tensor, weights: Tensor) -> Tensor:
    chosen, hidden, inner = mixture.num_active, p.shape.hidden_size, mixture.intermediate_size
    rows = Size(INDEX_BYTES * chosen)
    order = p.emit("sort", (), rows, grad=False)
    copied = _gather(p, x, x.size.times(chosen))
    sorted_weights = p.emit(
        "gather", (weights, order), weights.size, saves=(order,) if weights.grad else ()
    )
    both = _grouped(p, mixture, copied, hidden, 2 * inner)
    if mixture.bias:
        both = _clamped_gate(p, both)
    else:
        both = p.multiply(p.apply(p.shape.activation, both, keeps="input", share=0.5), both)
    out = _grouped(p, mixture, both, inner, hidden)
    width = 4 if mixture.wide_weights else p.itemsize
    kept = ((out,) if sorted_weights.grad else ()) + ((sorted_weights,) if out.grad else ())
    kind = "weigh_rows"
    reads: tuple[Tensor, ...] = (out, sorted_weights)
    if width != p.itemsize:
        kind += "_wide"
        if p.on_cpu:  # a CPU kernel of mixed dtypes makes a wide copy first, CUDA does not
            reads += (p.cast(out._replace(grad=False), p.itemsize, width),)
    weighed = p.emit(
        kind, reads, Size(float(chosen * hidden * width)), saves=kept,
        packs="before" if kept else "", passes=(1.0, 2.0),
    )  # fmt: skip
    restored = _gather(p, weighed, weighed.size)
    summed = p.apply("sum", restored, share=1.0 / chosen)
    result = p.cast(summed, width, p.itemsize)
    p.hold(order, copied, sorted_weights, out, restored, summed)  # local variables
    return result


def _gather(p: Program, x: Tensor, size: Size) -> Tensor:
    """Rows of ``x`` by index; the indices are kept."""
    assert p.shape.experts is not None
    index = Tensor(f"{p.name()} index", Size(INDEX_BYTES * p.shape.experts.num_active))
    return p.emit(
        "gather", (x,), size, saves=(index,) if x.grad else (), packs="before" if x.grad else ""
    )


def _grouped(p: Program, mixture: Experts, x: Tensor, inputs: int, outputs: int) -> Tensor:
    """Every row through its expert's matrix."""
    out = p.experts_product("grouped_mm", x, inputs, outputs, mixture.num_active)
    if not mixture.bias:
        return out
    rows = Tensor("expert of each row", Size(INDEX_BYTES * mixture.num_active))
    kept = (rows,) if p.trained else ()
    # A row's bias, added in place.
    bias = p.emit("gather", (), out.size, grad=p.trained, saves=kept)
    p.hold(bias)
    return out


def _clamped_gate(p: Program, both: Tensor) -> Tensor:
    """gpt-oss: (up + 1) gate sigmoid(alpha gate), gate and up clamped."""
    gate = p.apply("clamp", both, keeps="input", share=0.5)
    up = p.apply("clamp", both, keeps="input", share=0.5)
    open_ = p.apply("sigmoid", p.apply("scale", gate), keeps="output")
    return p.multiply(p.apply("scale", up), p.multiply(gate, open_))


def _shared(p: Program, linears: Sequence[LinearShape], x: Tensor) -> Tensor:
    into, up, down = linears
    active = p.apply(p.shape.activation, p.linear(into, x), keeps="input")
    out = p.linear(down, p.multiply(active, p.linear(up, x)))
    p.hold(x)
    return out


def _gate(p: Program, gate: LinearShape, x: Tensor, out: Tensor) -> Tensor:
    """The shared expert's output, weighed by what its gate lets through."""
    share = p.apply("sigmoid", p.linear(gate, x), keeps="output")
    kept = ((share,) if out.grad else ()) + ((out,) if share.grad else ())
    return p.emit("weigh_rows", (out, share), out.size, saves=kept, passes=(1.0, 2.0))
