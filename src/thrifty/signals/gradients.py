"""Exact gradients of single examples, one backward each, over the last decoder layer's weights.

    g(z) = grad over theta_last of  mean over t of  -log p(z_t | z_<t) m_t

Everything below that layer is frozen, so that the backward stops there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Tokens, Work
from thrifty.costs.flops import forward_flops, gradient_score_flops
from thrifty.costs.memory import forward_account
from thrifty.costs.time import forward_seconds
from thrifty.signals.forward import mean_flops

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


def last_layer_parameters(model: Any) -> list[Any]:
    """The weights of the last decoder layer: the last entry of the model's longest module list.

    Raises ValueError for a model without one.
    """
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of layers\n"
            "hint: gradient scorers need a decoder with layers; use bm25 or perplexity"
        )
    return [p for p in max(lists, key=len)[-1].parameters() if p.is_floating_point()]


def example_gradients(
    model: Any, shape: ModelShape, examples: Sequence[Tokens], meter: Meter
) -> Iterator[Any]:
    """One flat fp32 gradient [num_last_layer_parameters] an example, in order.

    The model is left as it was found: modes, requires_grad, no gradients.
    """
    import torch

    wanted = last_layer_parameters(model)
    device = wanted[0].device
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in wanted:
            p.requires_grad_(True)
        for example in examples:
            ids = torch.from_numpy(np.asarray(example.input_ids, dtype=np.int64)).to(device)[None]
            keep = torch.from_numpy(np.asarray(example.loss_mask)).to(device)[None, 1:]
            if not bool(keep.any()):
                yield torch.zeros(sum(p.numel() for p in wanted), device=device)
                continue
            meter.tick(Cost(flops=gradient_score_flops(shape, *ids.shape, last_layers=1)))
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits[keep], ids[:, 1:][keep])
                gradients = torch.autograd.grad(loss, wanted)
            yield torch.cat([g.float().flatten() for g in gradients])
    finally:
        for p, required in before:
            p.requires_grad_(required)
        model.train(training)


def gradient_scoring_cost(work: Work, stats: PoolStats) -> Cost:
    """Predicted cost of ``example_gradients``: batches of one, twice a forward's time or so."""
    if not stats.num_examples:
        return Cost()
    shape = work.shape
    length = max(1, min(round(stats.mean_tokens), work.max_length))
    flops = mean_flops(
        lambda tokens: gradient_score_flops(shape, 1, tokens, last_layers=1), stats, length
    )
    per_forward = forward_seconds(shape, 1, length, work.dtype, work.device)
    longest = min(stats.max_tokens, work.max_length)
    account = forward_account(shape, 1, longest, work.dtype, device_kind=work.device.kind)
    return Cost(
        flops=flops * stats.num_examples,
        seconds=per_forward * flops / forward_flops(shape, 1, length) * stats.num_examples,
        peak_memory_bytes=2 * account.peak_memory_bytes,
    )
