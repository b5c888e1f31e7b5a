"""A KV cache in few bits: keys by channel, values by token (KIVI, arXiv:2402.02750).

    code = round((x - least) / scale),  scale = (most - least) / (2^bits - 1)

Keys have channels that are large in all tokens, so that a channel of ``CACHE_GROUP`` tokens shares
its scale; values have none, and a token of a head shares its own. The tokens that do not fill a
group yet stay as the model made them, and a pass sees its own tokens so too. What is packed is
never packed again. Scales and offsets are float16.

transformers has a cache of this kind, which needs optimum-quanto or hqq, packs all of it anew at
every flush, and cannot drop rows that have ended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from thrifty.costs.decoding import CACHE_GROUP


class Packed(NamedTuple):
    """Codes, with scale and offset of what shares them."""

    codes: torch.Tensor
    """uint8 [rows, heads, tokens, size * bits / 8]."""
    scale: torch.Tensor
    least: torch.Tensor


class FewBitLayer(CacheLayerMixin):
    """Of one layer."""

    is_sliding = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.packed_keys: Packed | None = None
        self.packed_values: Packed | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, the new ones as they are given."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([*self._past(self.packed_keys), self.keys, key_states], dim=2)
        values = torch.cat([*self._past(self.packed_values), self.values, value_states], dim=2)
        own = self.keys.shape[2] + key_states.shape[2]
        full = own // CACHE_GROUP * CACHE_GROUP
        first = keys.shape[2] - own
        if full:
            ready = slice(first, first + full)
            self.packed_keys = _joined(self.packed_keys, self._pack_keys(keys[:, :, ready]))
            self.packed_values = _joined(self.packed_values, self._pack(values[:, :, ready], 3))
        # Copies, so that what was packed is let go of.
        self.keys = keys[:, :, first + full :].clone()
        self.values = values[:, :, first + full :].clone()
        return keys, values

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        packed = 0 if self.packed_keys is None else self.packed_keys.codes.shape[2]
        return int(packed + self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]
        for name in ("packed_keys", "packed_values"):
            packed = getattr(self, name)
            if packed is not None:
                setattr(self, name, Packed(*(part[indices] for part in packed)))

    @property
    def num_bytes(self) -> int:
        parts = [*(self.packed_keys or ()), *(self.packed_values or ()), self.keys, self.values]
        return sum(part.nbytes for part in parts)

    def _pack_keys(self, keys: torch.Tensor) -> Packed:
        grouped = keys.unflatten(2, (-1, CACHE_GROUP))
        codes, scale, least = self._pack(grouped, 3)
        return Packed(codes.flatten(2, 3), scale, least)

    def _pack(self, states: torch.Tensor, over: int) -> Packed:
        """With a scale for all along dimension ``over``."""
        least, most = states.amin(over, keepdim=True), states.amax(over, keepdim=True)
        most_code = 2**self.bits - 1
        # Rounded as they are kept, so that codes and scales belong together; no range: any scale.
        offset = least.half()
        scale = ((most.float() - offset.float()) / most_code).half()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = ((states.float() - offset.float()) / scale.float()).round()
        codes = codes.clamp(0, most_code).to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        return Packed(codes, scale, offset)

    def _past(self, packed: Packed | None) -> list[torch.Tensor]:
        """What was packed, made whole."""
        if packed is None:
            return []
        codes = packed.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        if packed.scale.dim() == 5:  # keys, by group
            codes = codes.unflatten(2, (-1, CACHE_GROUP))
        whole = codes.float() * packed.scale.float() + packed.least.float()
        whole = whole.flatten(2, 3) if whole.dim() == 5 else whole
        return [whole.to(self.dtype)]


def _joined(old: Packed | None, new: Packed) -> Packed:
    if old is None:
        return new
    return Packed(*(torch.cat(parts, dim=2) for parts in zip(old, new, strict=True)))
