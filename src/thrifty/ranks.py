"""The ranks under ``torchrun``: what all of them used, and what rank 0 tells the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from thrifty.core.budget import Cost


def summed(used: Cost, device: Any) -> Cost:
    """FLOPs and tokens over all ranks."""
    both = torch.tensor([used.flops, used.tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(both)
    return replace(used, flops=both[0].item(), tokens=both[1].item())


def told(stop: bool, device: Any) -> bool:
    """What rank 0 decided."""
    flag = torch.tensor([int(stop)], device=device)
    torch.distributed.broadcast(flag, 0)
    return bool(flag.item())
