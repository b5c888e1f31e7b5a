"""The logits of a few tokens at a time, made again for their backward.

A family's own code makes them of the hidden states, whatever it does to them on the way (a head
with an adapter, capped or scaled logits): its forward is asked again for each chunk, with a decoder
that answers with these hidden states. The loss is that of transformers' ``ForCausalLMLoss``:

    sum_t nll_t / num_items_in_batch,   or the mean where that is not given

in float32 whatever the dtype, with labels shifted by one and -100 left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from thrifty.data.packing import IGNORED
from thrifty.holding.recompute import decoder_of, plain_model
from thrifty.signals.sharded import is_sharded


def hold_few_logits(model: Any, tokens: int) -> None:
    """Have ``model`` make its loss of the logits of ``tokens`` at a time, where it is given labels;
    its output then has no logits. It also gets ``token_losses``, which evaluations ask.

    Raises ValueError where its family's loss is another.
    """
    plain = plain_model(model)
    _check(plain)
    plain.token_losses = partial(_token_losses, plain, tokens)
    plain.forward = partial(_forward, plain, tokens, plain.forward)
    if is_sharded(plain):  # what is not asked through its forward gathers no weights by itself
        register_fsdp_forward_method(plain, "token_losses")


def _check(plain: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    reason = None
    if plain.loss_function is not ForCausalLMLoss:
        reason = "a loss of its own"
    elif getattr(plain.config, "output_router_logits", False):
        reason = "a loss over its routers beside it"
    if reason is not None:
        raise ValueError(
            f"{plain.config.model_type} has {reason}, which is not made in chunks\n"
            "hint: memory.loss whole"
        )


def _forward(
    plain: Any,
    tokens: int,
    whole: Any,
    input_ids: Any = None,
    *,
    labels: Any = None,
    num_items_in_batch: Any = None,
    shift_labels: Any = None,
    **inputs: Any,
) -> Any:
    """In place of the model's forward: ``whole`` where there are no labels."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if labels is None and shift_labels is None:
        return whole(input_ids, **inputs)
    following = following_of(labels, shift_labels)
    losses = _token_losses(plain, tokens, following, input_ids=input_ids, **inputs)
    return CausalLMOutputWithPast(
        loss=losses.sum() / items_of(num_items_in_batch, losses, following)
    )


def following_of(labels: Any, shift_labels: Any) -> torch.Tensor:
    """Of each token the id that comes after it, -100 where none counts."""
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    found: torch.Tensor = shift_labels
    return found


def items_of(given: Any, losses: torch.Tensor, following: torch.Tensor) -> Any:
    """What a sum of ``losses`` is divided by."""
    items = (following != IGNORED).sum() if given is None else given
    return items.to(losses.device) if torch.is_tensor(items) else items


def _token_losses(plain: Any, tokens: int, following: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """[batch, sequence] in float32: of each token the negative log-likelihood of the id that
    ``following`` has for it, 0 where that is -100."""
    outputs, hidden, following = hidden_of(plain, following, **inputs)
    pairs = zip(hidden.flatten(0, 1).split(tokens), following.flatten().split(tokens), strict=True)
    losses = partial(_losses, plain, decoder_of(plain)[0], type(outputs))
    if torch.is_grad_enabled():
        losses = partial(checkpoint, losses, use_reentrant=False)
    found = [losses(*pair) for pair in pairs]
    return torch.cat(found).view(following.shape)


def hidden_of(plain: Any, following: torch.Tensor, **inputs: Any) -> tuple[Any, Any, torch.Tensor]:
    """What the decoder puts out, its hidden states, and ``following`` where they are."""
    given = {name: value for name, value in inputs.items() if value is not None}
    given = given | {"use_cache": False, "return_dict": True}
    given.pop("logits_to_keep", None)
    outputs = decoder_of(plain)[1](**given)
    hidden = outputs.last_hidden_state
    return outputs, hidden, following.to(hidden.device)


def _losses(
    plain: Any, decoder: str, outputs: type, hidden: torch.Tensor, following: torch.Tensor
) -> torch.Tensor:
    """[num_tokens] of hidden states ``[num_tokens, hidden]``."""
    logits = logits_of(plain, decoder, outputs(last_hidden_state=hidden[None]))[0]
    return functional.cross_entropy(
        logits.float(), following, ignore_index=IGNORED, reduction="none"
    )


def logits_of(plain: Any, decoder: str, decoded: Any) -> torch.Tensor:
    """[batch, sequence, vocab], as the family makes them of what its decoder put out."""
    asked = object.__new__(type(plain))
    asked.__dict__.update(plain.__dict__)
    asked._modules = {**plain._modules, decoder: _Decoded(decoded)}
    return type(plain).forward(asked).logits  # type: ignore[no-any-return]


class _Decoded(torch.nn.Module):
    """A decoder that has its answer already."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    @property
    def decoder(self) -> _Decoded:
        """Which some families ask inside (OPT)."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs
