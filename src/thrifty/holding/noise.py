"""Random numbers of one tensor at one step, which need not be stored to be had again."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, name: str, step: int, device: torch.device) -> torch.Generator:
    """The same for the same seed, name and step, and unlike that of any other."""
    key = hashlib.blake2b(f"{seed} {name} {step}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "big") >> 1)
