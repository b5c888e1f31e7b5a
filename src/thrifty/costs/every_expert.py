"""A mixture whose every expert runs on every token, as transformers executes Llama 4's.

Each token is copied once for every expert and scaled by its score, which is 0 for all experts but
the best, so that a layer with E experts costs and keeps E times what a gated mlp does, and two
copies of its input on top:

    T E (4 h + 8 inner) bytes in bf16, and 2 T E inner 3 h FLOPs,

whatever the router decides. (Kernels for serving run the chosen experts alone.)
"""

from __future__ import annotations

from thrifty.costs.operations import Program, Size, Tensor
from thrifty.costs.shape import Experts

INDEX_BYTES = 8.0


def every_expert(p: Program, mixture: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled copies of ``x`` that go in, and what comes out of each expert."""
    hidden, inner = p.shape.hidden_size, mixture.intermediate_size
    scores = _scores(p, mixture, x)
    scores = p.emit("copy", (scores,), scores.size)  # expert first
    copies = p.emit("copy", (x,), x.size.times(mixture.num_experts))
    kept = ((copies,) if scores.grad else ()) + ((scores,) if copies.grad else ())
    scaled = p.emit(
        "weigh_rows", (copies, scores), copies.size, saves=kept,
        packs="before" if kept else "", passes=(1.0, 2.0),
    )  # fmt: skip
    both = _batched(p, mixture, scaled, hidden, 2 * inner)
    active = p.apply(p.shape.activation, both, keeps="input", share=0.5)
    out = _batched(p, mixture, p.multiply(active, both), inner, hidden)
    p.hold(both)
    return scaled, out


def _scores(p: Program, mixture: Experts, x: Tensor) -> Tensor:
    logits = p.product(x, p.shape.hidden_size, mixture.num_experts, trained=p.trained)
    share = mixture.num_active / mixture.num_experts
    places = Tensor(f"{p.name()} places", Size(INDEX_BYTES * mixture.num_active))
    kept = (places,) if logits.grad else ()
    best = p.emit("topk", (logits,), logits.size.times(share), saves=kept)
    closed = p.cast(p.emit("scatter", (best,), logits.size), p.itemsize, 4)
    return p.cast(p.apply("sigmoid", closed, keeps="output"), 4, p.itemsize)


def _batched(p: Program, mixture: Experts, x: Tensor, inputs: int, outputs: int) -> Tensor:
    """Each copy through its expert's matrix."""
    return p.experts_product("bmm", x, inputs, outputs, mixture.num_experts)
