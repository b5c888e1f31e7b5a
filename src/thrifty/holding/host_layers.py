"""Frozen layers that wait on the host: one of them at a time is on the device.

A layer comes before its forward and again before its backward, in place of the one that was there:
of L layers 2 (L - 1) come in a step, since the last stays for the backward and the first for the
next forward. Its weights keep their place on the device, an empty storage while they are away, so
that what autograd kept of them is there again when they are. Pinned where the device is CUDA's.

Limits: a transfer waits for the computation before it and does not overlap.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from thrifty.signals.models import layers_of, load_model


class Link:
    """The way from the host."""

    def fetch(self, there: torch.Tensor, here: torch.Tensor) -> None:
        here.copy_(there, non_blocking=True)


def load_on_host(folder: Path, device: str) -> Any:
    """The model in ``folder`` in bfloat16, its layers on the host and all else on ``device``."""
    model = load_model(folder, "bfloat16", "cpu")
    wait_on_host(model, device)
    return model


def wait_on_host(model: Any, device: str, link: Link | None = None) -> None:
    """Have the layers of ``model``, which is on the host, stay there, frozen, and the rest go to
    ``device``; from then on a layer comes over ``link`` when it runs."""
    fetching = _Fetching(link or Link())
    for number, layer in enumerate(layers_of(model)):
        fetching.layers.append([_Waiting(weight, device) for weight in layer.parameters()])
        layer.register_forward_pre_hook(partial(fetching.before_forward, number))
        layer.register_forward_hook(partial(fetching.after_forward, number))
    model.to(device)


class _Waiting:
    """A weight whose values are on the host, and on the device only at times."""

    def __init__(self, weight: torch.nn.Parameter, device: str) -> None:
        pinned = torch.device(device).type == "cuda"
        self.there = weight.data.pin_memory() if pinned else weight.data
        # Not the weight itself, whose changes autograd would notice.
        self.here = torch.empty_like(self.there, device=device)
        self.storage = self.here.untyped_storage()
        self.num_bytes = self.storage.nbytes()
        weight.data = self.here
        weight.requires_grad_(False)
        self.drop()

    def fetch(self, link: Link) -> None:
        self.storage.resize_(self.num_bytes)
        link.fetch(self.there, self.here)

    def drop(self) -> None:
        self.storage.resize_(0)


class _Fetching:
    def __init__(self, link: Link) -> None:
        self.link = link
        self.layers: list[list[_Waiting]] = []
        self._here: int | None = None

    def before_forward(self, number: int, layer: Any, args: Any) -> None:
        self._turn_to(number)

    def after_forward(self, number: int, layer: Any, args: Any, outputs: Any) -> None:
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        if hidden.requires_grad:
            # Called once its gradient is whole: all that the layer above needed its weights for
            # is done.
            hidden.register_hook(partial(self._before_backward, number))

    def _before_backward(self, number: int, gradient: torch.Tensor) -> None:
        self._turn_to(number)

    def _turn_to(self, number: int) -> None:
        if self._here == number:
            return
        if self._here is not None:
            for weight in self.layers[self._here]:
                weight.drop()
        self._here = number
        for weight in self.layers[number]:
            weight.fetch(self.link)
