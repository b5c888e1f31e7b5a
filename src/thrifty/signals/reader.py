"""A model that reads on: what its rows have read so far is in its cache.

Rows are padded on the left and may differ in length; a mask tells which columns of the cache are a
row's own. Columns can be forgotten (drafts that were refused) or given up (what a window leaves
behind): then each row's own ones move to the right, in their order, and keep their positions.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from thrifty.costs.decoding import token_flops

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape
    from thrifty.costs.token_settings import KVCache


class Reader:
    """``model`` in evaluation mode, with an empty cache; ``kept``: in few bits, or a window."""

    def __init__(self, model: Any, shape: ModelShape, kept: KVCache | None = None) -> None:
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.shape = shape
        self._model, self._kept = model, kept
        self._takes = inspect.signature(type(self.inner).forward).parameters
        self.device = next(model.parameters()).device
        self.cache = _new_cache(self.inner.config, shape, kept)
        self._mask: Any = None  # [rows, columns]: whether a column is the row's own
        self._positions: Any = None  # [rows]: tokens read

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return 0 if self._mask is None else int(self._mask.shape[1])

    @property
    def token_flops(self) -> float:
        """Of the next token of a row."""
        return token_flops(self.shape, self.width)

    def read(self, ids: Any, own: Any = None, keep: int = 1, *, head: bool = True) -> Any:
        """[rows, keep, vocab] in float32: logits of what follows each of the last tokens; without
        the ``head`` the states that it is applied to, of all of them.

        ``ids`` [rows, new]; ``own`` like it: 0 where a row has no token of its own.
        """
        import torch

        own = torch.ones_like(ids) if own is None else own
        if self._mask is None:
            self._mask = own.new_zeros(len(ids), 0)
            self._positions = own.new_zeros(len(ids))
        self._mask = torch.cat([self._mask, own], dim=1)
        # What is read past the context is thrown away: it is beyond every row's limit.
        positions = self._positions[:, None] + own.cumsum(1) - 1
        positions = positions.clamp(min=0, max=self.shape.max_position_embeddings - 1)
        self._positions = self._positions + own.sum(1)
        given = {"position_ids": positions, "logits_to_keep": keep}
        outputs = (self._model if head else self.inner.base_model)(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self.cache,
            use_cache=True,
            **{
                name: value
                for name, value in given.items()
                if name in self._takes and (head or name != "logits_to_keep")
            },
        )
        if self._kept is not None and self._kept.window:
            self._give_up()
        return outputs.logits[:, -keep:].float() if head else outputs.last_hidden_state

    def select(self, rows: Any) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]

    def of(self, rows: Any) -> Reader:
        """Another reader that has read what these rows have, each as often as it is named."""
        other = copy.copy(self)
        other.cache = copy.copy(self.cache)
        other.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        other.select(rows)
        return other

    def forget(self, counts: Any) -> None:
        """The last columns of each row, so many of its own [rows]; and all that no row owns."""
        import torch

        last = self._mask.flip(1).cumsum(1).flip(1)  # a row's own, from here to the end
        self._mask = torch.where(last <= counts[:, None], 0, self._mask)
        self._positions = self._positions - counts
        columns = self._mask.argsort(dim=1, stable=True)  # its own to the right, in their order
        self._take(columns[:, self.width - int(self._mask.sum(1).max()) :])

    def _give_up(self) -> None:
        """All but the first and the last tokens of each row, as the window has it."""
        import torch

        assert self._kept is not None
        most = self._kept.kept(self.width)
        if most == self.width:
            return
        number = self._mask.cumsum(1) - 1  # of a row's own tokens
        recent = torch.arange(self.width, device=self.device) >= self.width - self._kept.window
        kept = self._mask.bool() & (recent | (number < self._kept.sinks))
        columns = kept.long().argsort(dim=1, stable=True)[:, self.width - most :]
        self._mask = torch.where(kept, self._mask, 0)
        self._take(columns)

    def _take(self, columns: Any) -> None:
        """Each row's columns [rows, width], in this order."""
        self._mask = self._mask.gather(1, columns)
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)  # [rows, heads, columns, size]
                places = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, places))

    @property
    def cache_bytes(self) -> int:
        """That the cache holds."""
        return sum(
            getattr(layer, "num_bytes", None) or layer.keys.nbytes + layer.values.nbytes
            for layer in self.cache.layers
        )


def _new_cache(config: Any, shape: ModelShape, kept: KVCache | None) -> Any:
    from transformers.cache_utils import Cache, DynamicCache

    if kept is None or not kept.bits:
        return DynamicCache(config=config)
    from thrifty.holding.few_bit_cache import FewBitLayer

    return Cache(layers=[FewBitLayer(kept.bits) for _ in range(shape.num_layers)])
