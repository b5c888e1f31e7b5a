"""Frozen linears in 8-bit floating point (e4m3), a float32 scale a row.

W = s q with |q| at most 448, the largest that e4m3 has; q has 3 bits of mantissa, so that a weight
is off by 1/16 of itself at most, and those below s 2^-6 by s 2^-10. Each use makes the weight
whole, which any device can. The bits are kept as bytes, since libraries take a floating weight for
one to compute with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thrifty.costs.shape import read_shape
from thrifty.holding.few_bit_shapes import stored_linears
from thrifty.holding.few_bits import frozen_linear
from thrifty.signals.models import layers_of, load_model

LARGEST = 448.0
SMALLEST_SCALE = 1e-12
"""Of a row of zeros."""


class Float8Linear(torch.nn.Linear):
    """A frozen linear whose weight is [out, in] bytes of e4m3 and ``scales`` [out, 1]."""

    scales: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        stored, scales = stored_in_float8(linear.weight.detach())
        self.weight = torch.nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = linear.bias

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.view(torch.float8_e4m3fn).to(dtype).mul_(self.scales.to(dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_linear(input, self.whole, self.bias)


def stored_in_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of e4m3 like ``weight``, and the scale of each row in float32."""
    wide = weight.float()
    scales = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (wide / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales


def load_float8(folder: Path, device: str) -> Any:
    """The model in ``folder`` with its layers' linears in e4m3, computing in bfloat16. They are
    stored one at a time, on the host, before it goes to ``device``."""
    model = load_model(folder, "bfloat16", "cpu")
    stored = {linear.name for linear in stored_linears(read_shape(folder))}
    for layer in layers_of(model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if name in stored and isinstance(child, torch.nn.Linear):
                    setattr(module, name, Float8Linear(child))
    return model.to(device)
