"""From the bytes that tensors take to what a device must have: allocated, reserved, device memory.

    allocated   what tensors take: ``torch.cuda.max_memory_allocated``     closed form
    reserved    what the caching allocator holds for them                  calibrated
    device      with the CUDA context and the libraries' workspaces,
                as nvidia-smi shows it                                     calibrated

Reserved over allocated, calibrated on published rows (``bench/published_memory.py``): two of them
give reserved bytes and state a setting that the closed form knows, LoRA of rank 32 and of rank 64
on Llama-3.2-3B at 4 x 768 in PEFT's method comparison, 1.3% and 1.9% over the account. Two rows of
one setting say nothing of the spread: gaps of 2% to 7% have been published (PEFT, torchtitan,
Liger), and the standard error is taken from there. Fragmentation grows with the variety of sizes,
so rows of one length lie at the lower end. On a CPU there is no such allocator: the resident set is
what is allocated and the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.costs.memory import RUNTIME_BYTES

RESERVED_SHARE = {"cpu": (0.0, 0.0), "cuda": (0.016, 0.02)}
"""Of the allocated bytes, what the allocator holds on top: mean and standard error."""
MODEL_STDERR = 0.02
"""Of the closed form itself, against traced steps."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes at the peak, by what counts them, and a 90% interval of the last."""

    allocated: float
    reserved: float
    device: float
    low: float
    high: float


def device_memory(allocated: float, kind: str) -> DeviceMemory:
    share, stderr = RESERVED_SHARE[kind]
    reserved = allocated * (1.0 + share)
    device = reserved + RUNTIME_BYTES[kind]
    spread = 1.645 * allocated * (stderr**2 + MODEL_STDERR**2) ** 0.5
    return DeviceMemory(
        allocated=allocated,
        reserved=reserved,
        device=device,
        low=device - spread,
        high=device + spread,
    )


def allocatable(device_bytes: float, kind: str) -> float:
    """What tensors may take where a device has that much."""
    return (device_bytes - RUNTIME_BYTES[kind]) / (1.0 + RESERVED_SHARE[kind][0])
