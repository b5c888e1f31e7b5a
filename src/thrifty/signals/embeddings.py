"""Rows as vectors: the position-weighted mean of the last hidden states (RDS+, arXiv:2503.01807).

    v(z) = sum_i i h_i / sum_i i,   i = 1 .. number of tokens,   then v / |v|

h_i are the decoder's outputs, before the head, which is not run: later tokens have seen more of the
row and weigh more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Tokens, Work
from thrifty.costs.flops import score_flops
from thrifty.signals.forward import as_read, each_batch, scoring_cost, shape_of

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


def row_vectors(
    model: Any, shape: ModelShape, examples: Sequence[Tokens], meter: Meter
) -> NDArray[np.float32]:
    """[n, width], each of unit length. Ticks ``meter`` with the FLOPs of every padded batch."""
    import torch

    vectors: dict[int, NDArray[np.float32]] = {}
    lengths = [len(example.input_ids) for example in examples]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def visit(batch: list[int], ids: Any, keep: Any) -> None:
        meter.tick(Cost(flops=score_flops(shape, *ids.shape, logits=False)))
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        place = torch.arange(1, ids.shape[1] + 1, device=ids.device, dtype=torch.float32)
        ends = torch.tensor([lengths[i] for i in batch], device=ids.device)
        weights = place * (place <= ends[:, None])
        mean = torch.einsum("bs,bsh->bh", weights / weights.sum(1, keepdim=True), hidden)
        found = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        vectors.update(zip(batch, found, strict=True))

    each_batch(model, shape, examples, visit)
    return np.stack([vectors[place] for place in range(len(examples))])


def embedding_cost(work: Work, stats: PoolStats, model: str = "") -> Cost:
    """Of ``row_vectors`` over rows like ``stats``: a forward pass without its head."""
    cost = scoring_cost(work, stats, model)
    shape = shape_of(work, model)
    mean = as_read(work, stats, model).mean_tokens
    length = max(1, min(round(mean), work.max_length))
    headless = score_flops(shape, 1, length, logits=False) / score_flops(shape, 1, length)
    return replace(cost, flops=cost.flops * headless, seconds=cost.seconds * headless)
