"""Rounding float32 to bfloat16 at random, so that the mean is what was rounded.

A value between two neighbours a < x < b becomes b with probability (x - a) / (b - a). Rounded to
nearest, an update of less than half of their distance (2^-9 of the weight) is lost each time.
"""

from __future__ import annotations

import torch

_DROPPED = 16
"""Low bits of a float32 that a bfloat16 does not have."""


def round_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``values`` (float32) as bfloat16. What is not finite stays so."""
    bits = torch.empty_like(values, dtype=torch.int32)
    bits.random_(0, 1 << _DROPPED, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << _DROPPED)
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    # A NaN's bits could be carried into those of a number.
    return rounded.masked_fill_(values.isnan(), torch.nan)
