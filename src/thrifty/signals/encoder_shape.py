"""What a pass of an encoder takes, for models that ``costs/`` has no closed form for: read off the
sizes of its weights.

    FLOPs of a row = 2 (N T + H) + 4 L d T^2

N are the parameters of matrices in its L layers, each used once a token, H those of its head, once
a row, d its width, T the row's tokens, padding included. Embeddings are looked up, not multiplied.
Attention is counted dense, as eager attention executes it. Not seen: experts that a token passes
by, position matrices inside attention (DeBERTa), windows (ModernBERT). A row is priced at the
tokens that the pool has of it, since nothing is tokenised anew for a price: another vocabulary, or
a longer reach than training's, shows in what is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Work
from thrifty.costs.shape import read_config
from thrifty.costs.time import rate
from thrifty.signals.weight_files import stored_tensors

BATCH_TOKENS = 8192
"""Padded tokens of a batch, one row at least."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_LOOKED_UP = re.compile(r"embed|wte|wpe|lm_head|predictions")
"""Embeddings, and the heads of a pretraining that nobody runs."""
_WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")
_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_SLOWER = 2.0
"""Than its products alone: norms, activations, softmax. An estimate."""
_BYTES_PER_VALUE = 4.0
_KEPT_VALUES = 12.0
"""Of its width that a layer holds of a token at once, an estimate."""


@dataclass(frozen=True)
class EncoderShape:
    """Its sizes, as far as a pass is paid by them."""

    per_token: float
    """Parameters that every token is multiplied with."""
    per_row: float
    """Parameters of the head."""
    num_layers: int
    width: int
    num_bytes: float
    """Of all weights."""

    @classmethod
    def of(cls, folder: Path) -> EncoderShape:
        """Of the encoder whose config and safetensors lie in ``folder``."""
        return _read(folder)

    def flops(self, batch: int, sequence: int) -> float:
        """Of a pass over ``[batch, sequence]``."""
        products = 2.0 * (self.per_token * sequence + self.per_row)
        return batch * (products + 4.0 * self.num_layers * self.width * sequence**2)

    def cost(self, work: Work, stats: PoolStats, max_length: int | None) -> Cost:
        """Predicted, of rows like ``stats`` cut at ``max_length``."""
        if not stats.num_examples:
            return Cost()
        most = max_length or stats.max_tokens
        length = min(stats.mean_tokens, most)
        squares = min(stats.mean_squared_tokens, length * most)
        each = self.flops(1, 1) + 2.0 * self.per_token * (length - 1)
        each += 4.0 * self.num_layers * self.width * (squares - 1)
        speed = rate(work.device, "float32", max(self.width, 1))
        held = max(BATCH_TOKENS, min(stats.max_tokens, most)) * self.width * _KEPT_VALUES
        return Cost(
            flops=each * stats.num_examples,
            seconds=_SLOWER * each * stats.num_examples / float(speed),
            peak_memory_bytes=self.num_bytes + held * _BYTES_PER_VALUE,
        )


@lru_cache(maxsize=16)
def _read(folder: Path) -> EncoderShape:
    config = read_config(folder)
    layers: dict[str, float] = {}
    per_row = 0.0
    tensors = stored_tensors(folder)
    for tensor in tensors:
        if len(tensor.shape) != 2 or _LOOKED_UP.search(tensor.name):
            continue
        layer = _LAYER.search(tensor.name)
        if layer is None:
            per_row += prod(tensor.shape)
        else:
            layers[layer[1]] = layers.get(layer[1], 0.0) + prod(tensor.shape)
    depth = int(next((config[name] for name in _DEPTHS if name in config), len(layers)))
    shared = depth / len(layers) if layers else 0.0  # ALBERT uses one layer's weights for all
    return EncoderShape(
        per_token=sum(layers.values()) * max(shared, 1.0),
        per_row=per_row,
        num_layers=depth if layers else 0,
        width=int(next((config[name] for name in _WIDTHS if name in config), 0)),
        num_bytes=float(sum(tensor.end - tensor.begin for tensor in tensors)),
    )
