"""Gradients of single examples at the output head, from a forward pass alone, as factors.

    dL/dW = sum_t e_t h_t^T,    e_t = (p_t - y_t) / n     (n tokens carry loss; e_t = 0 elsewhere)

h_t is what the head W is given, p_t what the model predicts of token t + 1, y_t that it is this
token. A product of two such gradients needs neither of them:

    < dL_z/dW, dL_v/dW > = sum over s of z, t of v of  (e_s . e_t) (h_s . h_t)

Exact for the head's own weights; of a model that ties its head to its embedding, the head's part.
Where a model caps its logits, the slope of the cap is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Tokens, Work
from thrifty.costs.flops import forward_flops
from thrifty.signals.forward import (
    as_read,
    batch_tokens,
    each_batch,
    mean_flops,
    padding,
    scoring_cost,
    shape_of,
)

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True)
class HeadGradients:
    """Of a batch's examples, as their factors, in float32."""

    errors: Any
    """e, [batch, sequence - 1, vocab]"""
    hidden: Any
    """h, [batch, sequence - 1, width]"""

    def squared_norms(self) -> Any:
        """[batch]"""
        likeness = (self.errors @ self.errors.mT) * (self.hidden @ self.hidden.mT)
        return likeness.double().sum((1, 2)).clamp_min(0)

    def products(self, directions: Any) -> Any:
        """[batch, m], with m gradients of the head [m, vocab, width]."""
        import torch

        found = [((self.errors @ each) * self.hidden).sum((1, 2)) for each in directions]
        return torch.stack(found, dim=1)

    def weighed_sum(self, weights: Any) -> Any:
        """[vocab, width]: the sum of the gradients, each ``weights`` [batch] times."""
        errors = self.errors * weights[:, None, None].to(self.errors.dtype)
        return errors.flatten(0, 1).T @ self.hidden.flatten(0, 1)


def each_head(
    model: Any,
    shape: ModelShape,
    examples: Sequence[Tokens],
    meter: Meter,
    visit: Callable[[list[int], HeadGradients], None],
    passes: int,
) -> None:
    """``visit(places, gradients)`` a padded batch of like lengths at a time. ``passes``: how often
    the visit multiplies all errors with something as wide as the model, which is ticked too."""
    import torch

    seen: list[Any] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    def batch(places: list[int], ids: Any, keep: Any) -> None:
        meter.tick(Cost(flops=_flops(shape, passes, *ids.shape)))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        errors = torch.softmax(logits, dim=-1)
        errors.scatter_add_(2, ids[:, 1:, None], -torch.ones_like(errors[:, :, :1]))
        errors *= (keep / keep.sum(1, keepdim=True).clamp_min(1))[:, :, None]
        visit(places, HeadGradients(errors, seen.pop()[:, :-1].float()))

    try:
        each_batch(model, shape, examples, batch)
    finally:
        hook.remove()


def head_gradients_cost(work: Work, stats: PoolStats, passes: int, model: str = "") -> Cost:
    """Predicted cost of ``each_head`` over rows like ``stats``, with ``passes`` directions held."""
    cost = scoring_cost(work, stats, model)
    if not stats.num_examples:
        return cost
    shape = shape_of(work, model)
    stats = as_read(work, stats, model)
    length = max(2, min(round(stats.mean_tokens), work.max_length))
    longest = min(stats.max_tokens, work.max_length)
    rows = max(1, batch_tokens(shape.vocab_size) // length)
    flops = mean_flops(lambda tokens: _flops(shape, passes, 1, tokens), stats, length)
    flops *= stats.num_examples * padding(stats, longest, rows)
    logits = 4.0 * max(batch_tokens(shape.vocab_size), longest) * shape.vocab_size
    directions = 4.0 * passes * shape.vocab_size * shape.embedding_size
    return replace(
        cost,
        flops=flops,
        seconds=cost.seconds * flops / cost.flops,
        peak_memory_bytes=cost.peak_memory_bytes + 2 * logits + directions,
    )


def _flops(shape: ModelShape, passes: int, rows: int, length: int) -> float:
    """Of a forward pass, the products of tokens with tokens, and ``passes`` of the head."""
    predicted, vocab, width = length - 1, shape.vocab_size, shape.embedding_size
    tokens = 2.0 * rows * predicted * predicted * (vocab + width)
    return (
        forward_flops(shape, rows, length)
        + tokens
        + passes * 2.0 * rows * predicted * vocab * width
    )
