"""Each layer's MLP over a few tokens of the rows at a time, and again in the backward.

An MLP looks at each token alone, so that slices of a row give what the row gives. Of a slice its
input is kept; all that is wider lives while that slice runs. It acts while the model is in training
mode alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from thrifty.costs.shape import ModelShape
from thrifty.holding.recompute import plain_model
from thrifty.signals.models import layers_of


def run_in_slices(model: Any, tokens: int) -> None:
    """Have the layers of ``model`` run their MLP over ``tokens`` of each row at a time.

    Raises ValueError where a family's experts choose among tokens, or its MLP is no module.
    """
    plain = plain_model(model)
    family = plain.config.model_type
    layers = list(layers_of(plain))
    if ModelShape.from_config(plain.config.to_dict()).experts is not None:
        raise ValueError(
            f"{family} has experts, each of which would run again for every slice of the tokens\n"
            "hint: recompute whole layers"
        )
    if not all(isinstance(getattr(layer, "mlp", None), torch.nn.Module) for layer in layers):
        raise ValueError(
            f"the MLP of {family} is no module of its own, which could be given slices\n"
            "hint: recompute whole layers"
        )
    for layer in layers:
        layer.mlp.forward = partial(_in_slices, layer.mlp, layer.mlp.forward, tokens)


def _in_slices(mlp: Any, whole: Any, tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """``whole(hidden)``, [batch, sequence, hidden]."""
    if not (mlp.training and torch.is_grad_enabled()):
        return whole(hidden)  # type: ignore[no-any-return]
    of_slice = partial(checkpoint, partial(_of_slice, whole), use_reentrant=False)
    return torch.cat([of_slice(each) for each in hidden.split(tokens, dim=1)], dim=1)


def _of_slice(whole: Any, part: torch.Tensor) -> torch.Tensor:
    """The copy, which some families need, is made again too: a view is kept."""
    return whole(part.contiguous())  # type: ignore[no-any-return]
