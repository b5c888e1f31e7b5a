"""GaLore whose projector has 4 or 8 bits and whose moments have 8 (Q-GaLore, arXiv:2407.08296).

The projector's values, in blocks of 256, are whole numbers times a float32 scale, at most 7 or 127
of them to either side. When it is due to be renewed, the new space is compared with the old:

    similarity = |P' Q| / sqrt(r),   1 where both span the same, sqrt(r / m) where they are random

From ``settled`` on, the interval to the next doubles: spaces that stand still are looked for less
often. Moments are bitsandbytes' dynamic codes, but that those of vectors are float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from thrifty.holding.few_bit_states import _library
from thrifty.holding.projected_adam import ProjectedAdam, first_singular_vectors
from thrifty.holding.tensor_by_tensor import adam_direction, move

BLOCK = 256
"""Elements that share a scale."""
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""And whether they have a sign."""


class QGaLore(ProjectedAdam):
    """``bits``: of the projector; ``settled``: the similarity from which on intervals double."""

    def __init__(
        self, groups: list[dict[str, Any]], *, bits: int, settled: float, **projection: Any
    ) -> None:
        _library("bitsandbytes", "q_galore")
        super().__init__(groups, **projection)
        self.bits, self.settled = bits, settled

    def update(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        if self.is_projected(name, parameter):
            super().update(name, parameter, gradient, state, group)
        else:
            move(parameter, few_bit_direction(gradient, state), group)

    def direction(
        self,
        name: str,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if state["step"] == state.setdefault("renewal", 1):
            self._renew(gradient, state)
        projector = self._projector(gradient, state)
        low = few_bit_direction(projector.mT @ gradient, state)
        return (projector @ low).mul_(self.scale)

    def _renew(self, gradient: torch.Tensor, state: dict[str, Any]) -> None:
        vectors = first_singular_vectors(gradient, self.rank)
        interval = self.refresh
        if "projector" in state:
            before = self._projector(gradient, state)
            # Their signs are arbitrary; the moments go on with those of the vectors before.
            turned = (vectors * before).sum(-2, keepdim=True) < 0
            vectors = torch.where(turned, -vectors, vectors)
            settled = bool((similarity(before, vectors) >= self.settled).all())
            interval = state["interval"] * (2 if settled else 1)
        state["projector"], state["projector_scales"] = in_few_bits(vectors, self.bits)
        state["interval"], state["renewal"] = interval, state["step"] + interval

    def _projector(self, gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """[..., m, r], in the gradient's dtype."""
        size = torch.Size((*gradient.shape[:-1], self.rank))
        row = from_few_bits(state["projector"], state["projector_scales"], self.bits)
        return row[: size.numel()].view(size).to(gradient.dtype)


def similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of the spaces of two sets of r orthonormal vectors, [..., m, r]: the root mean square of the
    cosines of their principal angles."""
    return (one.mT @ other).norm(dim=(-2, -1)) / one.shape[-1] ** 0.5


def in_few_bits(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two a byte where ``bits`` is 4, and a float32 scale a block."""
    row = values.detach().float().flatten()
    blocks = functional.pad(row, (0, -len(row) % BLOCK)).view(-1, BLOCK)
    most = 2 ** (bits - 1) - 1
    scales = blocks.abs().amax(dim=1, keepdim=True) / most
    codes = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    codes = codes.flatten()[: len(row) + len(row) % 2]
    if bits == 4:
        codes = (codes[::2] + most) | (codes[1::2] + most) << 4
        codes = codes.view(torch.uint8)
    return codes, scales.flatten()


def from_few_bits(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The values as one row of float32, which may end with one more."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).to(torch.int8) - 7
    row = codes.flatten().float()
    return row.mul_(scales.repeat_interleave(BLOCK)[: len(row)])


def few_bit_direction(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """``adam_direction``, whose moments are kept in 8 bits between steps; of vectors in float32."""
    if gradient.dim() < 2:
        return adam_direction(gradient, state, torch.float32)
    whole: dict[str, Any] = {"step": state["step"]}
    for moment, signed in MOMENTS.items():
        if moment in state:
            whole[moment] = _dynamic(state[moment], state[f"{moment}_scales"], gradient, signed)
    direction = adam_direction(gradient, whole, torch.float32)
    for moment, signed in MOMENTS.items():
        state[moment], state[f"{moment}_scales"] = _in_dynamic(whole.pop(moment), signed)
    return direction


@lru_cache(maxsize=8)
def _numbers(signed: bool, device: torch.device) -> torch.Tensor:
    """Of the 256 codes."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)  # type: ignore[no-any-return]


def _in_dynamic(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import quantize_blockwise

    code = _numbers(signed, values.device)
    codes, made = quantize_blockwise(values.contiguous(), code=code, blocksize=BLOCK)
    return codes, made.absmax


def _dynamic(
    codes: torch.Tensor, scales: torch.Tensor, like: torch.Tensor, signed: bool
) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    code = _numbers(signed, codes.device)
    found = dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)
    return found.view(like.shape)
