"""What a decoder keeps for its backward waits on the host and comes back when it is asked for.

A storage goes down once, however many views of it are kept, and comes up again for the first that
is used while none is; weights stay where they are. On CUDA the host's side is pinned, and the way
down runs on a stream of its own while the forward goes on.
"""

from __future__ import annotations

import weakref
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from thrifty.holding.recompute import decoder_of, plain_model


class Link:
    """The way to the host and back, for a device that is the host: copies."""

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    def up(self, there: torch.Tensor, device: torch.device) -> torch.Tensor:
        return there.clone()


class CudaLink(Link):
    """Pinned memory, and a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            there.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its bytes are not given away before they are copied
        return there

    def up(self, there: torch.Tensor, device: torch.device) -> torch.Tensor:
        torch.cuda.current_stream(device).wait_stream(self.stream)
        return there.to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _link_of(device: torch.device) -> Link:
    return CudaLink(device) if device.type == "cuda" else Link()


def offload(model: Any, link: Link | None = None) -> None:
    """Have the decoder of ``model`` keep on the host what its backward needs; over ``link``, by
    default that of the device which its weights are on."""
    _, decoder = decoder_of(plain_model(model))
    decoder.forward = partial(_offloading, decoder, decoder.forward, link)


def _offloading(decoder: Any, forward: Any, link: Link | None, *args: Any, **kwargs: Any) -> Any:
    weights = list(decoder.parameters())
    host = _Host(link or _link_of(weights[0].device), weights)
    with torch.autograd.graph.saved_tensors_hooks(host.pack, host.unpack):
        return forward(*args, **kwargs)


class _Waiting:
    """A storage on the host, as one row [num_elements]."""

    def __init__(self, there: torch.Tensor, device: torch.device) -> None:
        self.there, self.device = there, device
        self._here: weakref.ref[torch.UntypedStorage] | None = None

    def fetch(self, link: Link) -> torch.Tensor:
        """The row on the device; the same as long as something there uses it."""
        storage = None if self._here is None else self._here()
        if storage is not None:
            return self.there.new_empty(0, device=self.device).set_(storage)  # type: ignore[call-overload, no-any-return]
        here = link.up(self.there, self.device)
        self._here = weakref.ref(here.untyped_storage())
        return here


class _View(NamedTuple):
    """A kept tensor, of a storage that waits."""

    waiting: _Waiting
    size: torch.Size
    stride: tuple[Any, ...]
    offset: Any


class _Host:
    """What of one forward waits there."""

    def __init__(self, link: Link, weights: list[torch.Tensor]) -> None:
        self.link = link
        self._resident = {weight.untyped_storage()._cdata for weight in weights}
        # By the storage, as long as it lives, and by its version: it may be written to in between.
        self._sent: dict[tuple[int, int, torch.dtype], weakref.ref[_Waiting]] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        storage = tensor.untyped_storage()
        if storage._cdata in self._resident or not storage.nbytes():
            return tensor
        key = storage._cdata, tensor._version, tensor.dtype
        waiting = self._sent[key]() if key in self._sent else None
        if waiting is None:
            row = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            waiting = _Waiting(self.link.down(row), tensor.device)
            self._sent[key] = weakref.ref(waiting)
            weakref.finalize(storage, self._sent.pop, key, None)
        return _View(waiting, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        here = kept.waiting.fetch(self.link)
        return here.as_strided(kept.size, kept.stride, kept.offset)
