"""What a dense mlp executes, all tokens or a few at a time, and a bottleneck adapter beside it.

    y = down(act(gate x) * up x) + U (act(G x) * (D x)),   or without gates
    y = down(act(up x)) + U act(D x)

with G and D of r x h and U of h x r, arXiv:2110.04366. G and D read the same copy of x in the
adapter's dtype, which is kept.
"""

from __future__ import annotations

from dataclasses import replace

from thrifty.costs.operations import Program, Tensor

ACTIVATIONS = {
    # Kernels that keep their output; every other activation is taken to keep its input.
    "relu": "output",
    "tanh": "output",
    "sigmoid": "output",
}


def mlp(p: Program, x: Tensor) -> Tensor:
    if not p.mlp_share:
        return _whole(p, x)
    inside = replace(p, operations=list(p.operations))
    out = _whole(inside, x)
    return p.sliced(inside.operations[len(p.operations) :], x, out, p.mlp_share)


def _whole(p: Program, x: Tensor) -> Tensor:
    linears = [linear for linear in p.shape.linears if linear.part == "mlp"]
    if not p.shape.gated:
        into, down = linears
        inner = _activation(p, p.linear(into, x))
    elif len(linears) == 2:  # gate and up are views of one product
        into, down = linears
        both = p.linear(into, x)
        active = p.apply(p.shape.activation, both, keeps=_keeps(p), share=0.5)
        inner = p.multiply(active, both)
    else:
        gate, up, down = linears
        active = _activation(p, p.linear(gate, x))
        inner = p.multiply(active, p.linear(up, x))
    out = p.linear(down, inner)
    if p.adapter is not None and p.adapter.form == "bottleneck":
        out = p.add(out, _bottleneck(p, p.adapter.rank, x))
    p.hold(x)
    return out


def _bottleneck(p: Program, rank: int, x: Tensor) -> Tensor:
    """In the adapter's dtype, and back."""
    hidden, size = p.shape.hidden_size, p.adapter_itemsize
    wide = p.cast(x, p.itemsize, size)
    active = _activation(p, p.product(wide, hidden, rank, trained=True, itemsize=size))
    inner = active
    if p.shape.gated:
        inner = p.multiply(active, p.product(wide, hidden, rank, trained=True, itemsize=size))
    high = p.product(inner, rank, hidden, trained=True, itemsize=size)
    p.hold(wide)
    return p.cast(high, size, p.itemsize)


def _keeps(p: Program) -> str:
    return ACTIVATIONS.get(p.shape.activation, "input")


def _activation(p: Program, x: Tensor) -> Tensor:
    if p.shape.activation not in ("gelu_new", "gelu_fast"):
        return p.apply(p.shape.activation, x, keeps=_keeps(p))
    # Written out in Python: x, 0.5 x, tanh(...) and 1 + tanh(...) are kept.
    parts = tuple(Tensor(f"{p.name()} {part}", x.size) for part in ("half", "tanh", "plus"))
    kept = (x, *parts) if x.grad else ()
    packs = "before" if kept else ""
    return p.emit("gelu_new", (x,), x.size, saves=kept, packs=packs, passes=(8.0, 12.0))
