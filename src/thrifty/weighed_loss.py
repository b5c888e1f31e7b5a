"""The loss of a batch whose tokens do not all count alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thrifty.data.packing import IGNORED
from thrifty.rounds import Rounds


def weighed_loss(logits: Any, batch: Mapping[str, Any], num_items: Any, rounds: Rounds) -> Any:
    """sum_t w_t nll_t / ``num_items``, over the tokens that carry loss; with weights of 1 it is
    what ``transformers`` takes.

    logits ``[batch, sequence, vocab]``; ``batch``: what ``PackedDataset`` gives where it tells
    rows, ``[batch, sequence]`` each. ``num_items``: tokens that carry loss in the whole optimizer
    step; None: in this batch.
    """
    import torch

    following = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        following.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    ).view(following.shape)
    counts = following != IGNORED
    number, row, place = (
        batch[name][:, 1:][counts].cpu().numpy() for name in ("epoch", "rows", "position_ids")
    )
    losses = nll[counts]
    weights = rounds.weigh(number, row, place, losses.detach().double().cpu().numpy())
    weighed = losses * torch.from_numpy(weights).to(losses)
    return weighed.sum() / (num_items if num_items is not None else max(int(counts.sum()), 1))
