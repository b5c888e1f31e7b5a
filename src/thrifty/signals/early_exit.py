"""Tokens from the first layer that is sure enough (CALM, arXiv:2207.07061; LayerSkip, 2404.16710).

After some of the layers the final norm and the head are applied to what the layer put out. Where
the likeliest token has at least ``threshold`` of the probability, the row leaves: its token is
drawn from those logits. In the layers that it skips, later tokens find keys and values made of the
state that it left with. Prompts are read whole.

At threshold 1 nothing is asked, and tokens are those of whole passes. The probability is that of an
early layer, which nobody has trained to be right: on models that were not trained for it, measure
(``bench/local_decoding.py``). Counted exactly: layers, keys and values, every use of the head.

Limits: the families that ``costs/token_settings.refusal`` lets through. A skipped layer's keys and
values are made by the model's own attention, which is left as soon as it hands them to its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter
from thrifty.costs.decoding import exit_flops
from thrifty.signals.generation_batch import said
from thrifty.signals.generation_rows import Rows
from thrifty.signals.models import layers_of
from thrifty.signals.reader import Reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from thrifty.costs.shape import ModelShape
    from thrifty.costs.token_settings import EarlyExit, KVCache


class EarlyExits:
    """A way of making tokens (``generation_batch.Way``)."""

    kept: KVCache | None = None

    def __init__(self, early: EarlyExit) -> None:
        self.early = early
        self.num_tokens = 0
        self.num_layers = 0
        """That those tokens went through."""

    def readers(self, model: Any, shape: ModelShape) -> list[Reader]:
        return [Reader(model, shape)]

    def grow(self, readers: list[Reader], rows: Rows, logits: Any, meter: Meter) -> None:
        (reader,) = readers
        layered = _Layered(reader, self.early)
        while (ids := said(rows, logits, reader)) is not None:
            cached = reader.width
            logits, left = layered.read(ids)
            each = [exit_flops(reader.shape, self.early, cached, int(layer)) for layer in left]
            rows.flops[rows.going] += each
            meter.tick(Cost(flops=sum(each)))
            self.num_tokens += len(left)
            self.num_layers += int(left.sum())


class _Layered:
    """A reader whose rows may leave after any of the layers asked."""

    def __init__(self, reader: Reader, early: EarlyExit) -> None:
        self._reader, self._early = reader, early
        self._layers = list(layers_of(reader.inner))
        self._asked = frozenset(early.asked_after(len(self._layers)))
        self._norm = _final_norm(reader.inner)
        self._head = reader.inner.get_output_embeddings()
        self._active: Any = None  # [rows]: which have not left
        self._logits: Any = None  # [rows, vocab]
        self._left: Any = None  # [rows]: the layer that each left after
        self._beside: Any = None  # what layers put out beside their states; None: they put out none

    def read(self, ids: Any) -> tuple[Any, NDArray[np.int64]]:
        """One token of each row: the logits of the next, and after which layer it left."""
        import torch

        self._active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._left = torch.full((len(ids),), len(self._layers), device=ids.device)
        self._logits = None
        with self._asking():
            states = self._reader.read(ids, head=False)
        if self._active.any():  # the decoder has applied its norm by now
            self._keep(self._active, self._head(states[self._active, -1]).float())
        return self._logits, self._left.cpu().numpy()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """The layers ask, until the end of the block."""
        for number, layer in enumerate(self._layers, 1):
            layer.forward = self._wrapped(number, layer, layer.forward)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward  # the class's own again

    def _wrapped(self, number: int, layer: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(states: Any, *args: Any, **kwargs: Any) -> Any:
            if self._active.all():
                out = run(states, *args, **kwargs)
                self._beside = out[1:] if isinstance(out, tuple) else None
                states = out[0] if isinstance(out, tuple) else out
            else:
                states = self._in_parts(layer, run, states, args, kwargs)
            if number in self._asked and self._active.any():
                self._ask(number, states)
            return states if self._beside is None else (states, *self._beside)

        return forward

    def _ask(self, number: int, states: Any) -> None:
        rows = self._active.nonzero()[:, 0]
        logits = self._head(self._norm(states[rows, -1])).float()
        sure = logits.softmax(-1).amax(-1) >= self._early.threshold
        if sure.any():
            leaving = rows[sure]
            self._keep(leaving, logits[sure])
            self._left[leaving] = number
            self._active[leaving] = False

    def _keep(self, rows: Any, logits: Any) -> None:
        if self._logits is None:
            self._logits = logits.new_zeros(len(self._active), logits.shape[-1])
        self._logits[rows] = logits

    def _in_parts(
        self, layer: Any, run: Callable[..., Any], states: Any, args: Any, kwargs: Any
    ) -> Any:
        """Rows that have left give keys and values alone, and keep their states."""
        active, gone = self._active, ~self._active

        def of(rows: Any, cache: Any) -> Any:
            parts = [self._part(each, rows, cache) for each in args]
            named = {name: self._part(each, rows, cache) for name, each in kwargs.items()}
            return run(states[rows], *parts, **named)

        handed = _Handed()
        with _without_queries(layer), suppress(_HandedOver):
            of(gone, handed)
        joined = _Joined(self._reader.cache, handed, active)
        if not active.any():
            joined.update(handed.keys[:0], handed.values[:0], handed.layer)
            return states
        out = of(active, joined)
        whole = states.clone()
        whole[active] = out[0] if isinstance(out, tuple) else out
        return whole

    def _part(self, value: Any, rows: Any, cache: Any) -> Any:
        """Of what a layer is given, what belongs to these rows."""
        import torch

        if value is self._reader.cache:
            return cache
        if isinstance(value, tuple):
            return tuple(self._part(each, rows, cache) for each in value)
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == len(rows) > 1:
            return value[rows]
        return value


class _HandedOver(Exception):
    """Keys and values are there; the rest of the layer is not wanted."""


class _Handed:
    """Stands in a cache's place."""

    keys: Any
    values: Any
    layer: int

    def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.keys, self.values, self.layer = keys, values, layer_idx
        raise _HandedOver


class _Joined:
    """A cache as the active rows see it, which stores those of the others beside theirs."""

    def __init__(self, cache: Any, others: _Handed, active: Any) -> None:
        self._cache, self._others, self._active = cache, others, active

    def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        both = []
        for own, others in ((keys, self._others.keys), (values, self._others.values)):
            whole = others.new_empty(len(self._active), *others.shape[1:])
            whole[self._active], whole[~self._active] = own, others
            both.append(whole)
        found = self._cache.update(*both, layer_idx, *args, **kwargs)
        return tuple(states[self._active] for states in found)


@contextmanager
def _without_queries(layer: Any) -> Iterator[None]:
    """Where queries are a product of their own, it is left out: zeros stand for them."""
    found = [module for name, module in layer.named_modules() if name.endswith("q_proj")]
    for module in found:
        module.forward = lambda states, size=module.out_features: states.new_zeros(
            *states.shape[:-1], size
        )
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _final_norm(inner: Any) -> Any:
    """What a decoder applies to its last layer's states. Raises ValueError where that is not
    clear."""
    layers = layers_of(inner)
    holders = [each for each in inner.modules() if layers in each.children()]
    found = [each for each in holders[0].children() if "norm" in type(each).__name__.lower()]
    if len(found) != 1:
        raise ValueError(
            f"{type(inner).__name__} has {len(found)} norms beside its layers\n"
            "hint: an early exit needs the one norm before the head"
        )
    return found[0]
