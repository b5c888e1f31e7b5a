"""The loss of a few tokens at a time, and its gradient with it (arXiv:2410.10989).

    d sum_t nll_t / d z = softmax(z) - onehot(following),   z = W h + b

hangs on nothing that comes later, so that a chunk's is made while its logits are there, multiplied
out and dropped: no logits are kept, and none are made again. What waits for the backward are the
gradients of the hidden states and of the head, which the loss's own gradient, a number, scales.

The sums are those of the plain loss: products in the dtype of the weights, softmax and loss in
float32. A family that does more to its logits than a linear head does is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from thrifty.data.packing import IGNORED
from thrifty.holding import chunked_loss
from thrifty.holding.recompute import decoder_of, plain_model


def hold_no_logits(model: Any, tokens: int) -> None:
    """Have ``model`` make its loss and that loss's gradient of ``tokens`` at a time, where it is
    given labels; its output then has no logits. Where no gradient is wanted it is the chunked loss.

    Raises ValueError where its family's loss is another, or its head is more than a linear.
    """
    plain = plain_model(model)
    if type(plain.get_output_embeddings()) is not torch.nn.Linear:
        raise ValueError(
            "the head has an adapter or is held in few bits, and its gradient would not be its "
            "own\nhint: memory.loss chunked"
        )
    if not _is_linear(plain):
        raise ValueError(
            f"{plain.config.model_type} does more to its logits than its head does\n"
            "hint: memory.loss chunked"
        )
    chunked_loss.hold_few_logits(plain, tokens)
    plain.forward = partial(_forward, plain, tokens, plain.forward)


def _is_linear(plain: Any) -> bool:
    """Whether the logits of hidden states are what the head makes of them; asked of two states."""
    head = plain.get_output_embeddings()
    if head.weight.is_meta:
        return True
    name, _ = decoder_of(plain)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.in_features, generator=generator).to(head.weight)
    with torch.no_grad():
        return torch.equal(chunked_loss.logits_of(plain, name, _Decoded(hidden)), head(hidden))


class _Decoded:
    """What a decoder puts out, of which nothing is known but the hidden states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return None if index else self.last_hidden_state


def _forward(
    plain: Any,
    tokens: int,
    chunked: Any,
    input_ids: Any = None,
    *,
    labels: Any = None,
    num_items_in_batch: Any = None,
    shift_labels: Any = None,
    **inputs: Any,
) -> Any:
    """In place of the model's forward: ``chunked`` where no gradient is wanted."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    given = {"labels": labels, "shift_labels": shift_labels}
    if (labels is None and shift_labels is None) or not torch.is_grad_enabled():
        return chunked(input_ids, num_items_in_batch=num_items_in_batch, **given, **inputs)
    following = chunked_loss.following_of(labels, shift_labels)
    _, hidden, following = chunked_loss.hidden_of(plain, following, input_ids=input_ids, **inputs)
    head = plain.get_output_embeddings()
    total = FusedLoss.apply(
        hidden.flatten(0, 1), head.weight, head.bias, following.flatten(), tokens
    )
    items = chunked_loss.items_of(num_items_in_batch, total, following)
    return CausalLMOutputWithPast(loss=total / items)


class FusedLoss(torch.autograd.Function):
    """[] in float32: the sum of the negative log-likelihoods of ``following`` [num_tokens], those
    of -100 left out, of hidden states [num_tokens, width] under a head [vocab, width]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        following: torch.Tensor,
        tokens: int,
    ) -> torch.Tensor:
        wants = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants[0] else None
        of_weight = torch.zeros_like(weight) if wants[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(hidden), tokens):
            part, ids = hidden[start : start + tokens], following[start : start + tokens]
            loss, of_logits = _loss_of(part, weight, bias, ids)
            total += loss
            if of_hidden is not None:
                of_hidden[start : start + tokens] = of_logits @ weight
            if of_weight is not None:
                of_weight.addmm_(of_logits.mT, part)
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            del of_logits  # before the next chunk's are made
        ctx.gradients = (of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        # A number scales in its own precision, whatever it scales.
        found = tuple(None if each is None else each.mul_(grad) for each in ctx.gradients)
        ctx.gradients = ()
        return (*found, None, None)


def _loss_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk's loss, and the gradient of its logits in the dtype of ``hidden``."""
    logits = functional.linear(hidden, weight, bias)
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    counts = (ids != IGNORED)[:, None]
    chosen = ids[:, None].masked_fill(~counts, 0)
    logits -= logits.amax(dim=-1, keepdim=True)  # in place throughout: the chunk is held once
    of_chosen = logits.gather(1, chosen)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    loss = ((total.log() - of_chosen) * counts).sum()
    probabilities = logits.div_(total)
    probabilities.scatter_add_(1, chosen, torch.full_like(of_chosen, -1.0))
    return loss, probabilities.mul_(counts).to(dtype)
