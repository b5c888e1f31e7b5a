"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), up to its queries, keys and values.

A token's keys and values are expanded from one latent vector c of width r, and so are its queries
where they have a latent of their own. Only d_r channels of a head are rotated; those of the keys
come straight from the hidden state and are the same in every head:

    c, k_r = W_a x          q_n, q_r = W_q x     (or from norm(W_qa x))
    k_n, v = W_b norm(c)    q = [q_n, rot(q_r)]  k = [k_n, rot(k_r)]

so that keys (d_n + d_r) are wider than values. While training the latent saves nothing: keys and
values are expanded, and what they are expanded from is kept besides. A cache holds c and k_r alone,
and expands all of it again at every step.
"""

from __future__ import annotations

from thrifty.costs.operations import Program, Size, Tensor
from thrifty.costs.rotary import rotate
from thrifty.costs.shape import Latent, LinearShape


def latent_projections(
    p: Program, latent: Latent, projections: list[LinearShape], x: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Queries, keys, values, and what Python variables hold besides."""
    *into_queries, down, up = projections
    q = p.linear(into_queries[0], x)
    if latent.query_rank:
        q = p.linear(into_queries[1], p.norm(q, latent.query_rank))
    both = p.linear(down, x)
    normal = p.norm(_view(p, both, latent.rank), latent.rank)
    heads, rotated = p.shape.num_attention_heads, p.shape.rotary_dim
    rotated_q = _rotated(p, q, heads * rotated)
    rotated_k = _rotated(p, both, rotated)
    size = Size(float(p.shape.query_size * p.itemsize))
    queries = p.emit("concatenate", (q, rotated_q), size)
    expanded = p.linear(up, normal)
    plain = _view(p, expanded, heads * (p.shape.head_dim - rotated))
    keys = p.emit("concatenate", (plain, rotated_k), size)
    values = _view(p, expanded, heads * latent.value_dim)
    return queries, keys, values, (q, both, normal, rotated_q, rotated_k)


def _view(p: Program, x: Tensor, width: int) -> Tensor:
    return x._replace(size=Size(float(width * p.itemsize)))


def _rotated(p: Program, x: Tensor, width: int) -> Tensor:
    part = _view(p, x, width)
    return rotate(p, part, part.size)
