"""From the bytes that tensors take to what a device must have: allocated, reserved, device memory.

    allocated   what tensors take: ``torch.cuda.max_memory_allocated``     closed form
    reserved    what the caching allocator holds for them                  calibrated
    device      with the CUDA context and the libraries' workspaces,
                as nvidia-smi shows it                                     calibrated

What is measured on top of the closed form is written down in ``RESIDUALS``, row by row. Its median
is the share that is expected, and its spread the interval: for n residuals of mean m and standard
deviation s, nine times in ten another one lies within

    m ± t s sqrt(1 + 1/n),        t the 95% point of Student's distribution with n - 1 degrees,

cut off below, since no allocator holds less than what tensors take. With four rows it is wide.

Scope: steps of Hugging Face's model code, eager, on one device, batches padded to one length, an
allocator that is emptied every ten steps, as in PEFT's comparison. Other implementations keep other
tensors and have no part in it: litgpt's rows lie 1% to 12% over the closed form, torchtune's 3% to
5%. Fragmentation grows with the variety of sizes. On a CPU there is no such allocator: the resident
set is what is allocated and the runtime.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from thrifty.costs.memory import RUNTIME_BYTES

RESIDUALS = {
    "cuda": {
        "LoRA rank 32 on q and v": 0.0133,
        "LoRA rank 64 on q and v": 0.0189,
        "LoRA rank 10 on the mlp": 0.0002,
        "full fine-tuning": 0.0737,
    },
    "cpu": {
        "full": 0.0063,
        "full, recompute": 0.0166,
        "LoRA": 0.0103,
        "LoRA, recompute": 0.0316,
    },
}
"""Measured over the closed form's allocated bytes, less 1. On CUDA: peaks of reserved memory that
PEFT's method comparison gives for Llama-3.2-3B in bf16 at 4 x 768, 20.76, 21.00, 23.00 and 36.20
GiB (huggingface/peft, method_comparison/MetaMathQA/results, 5d602fdb). On a CPU: the resident set
of two steps of the Trainer beside the runtime, 1113, 613, 879 and 424 MiB (docs/costs.md)."""

CLOSED_FORM_ERROR = 0.003
"""Of the closed form against traced steps: the worst of 161 (docs/costs.md)."""

STUDENT_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""95% points of Student's t for 1, 2, ... degrees of freedom; more are taken as the last."""

RESERVED_SHARE = {"cpu": 0.0, "cuda": round(statistics.median(RESIDUALS["cuda"].values()), 3)}
"""Of the allocated bytes, what the allocator is expected to hold on top."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes at the peak, by what counts them, and a 90% interval of the last."""

    allocated: float
    reserved: float
    device: float
    low: float
    high: float


def share_interval(residuals: Sequence[float]) -> tuple[float, float]:
    """The 90% interval of one more residual, from two or more of them."""
    mean, deviation = statistics.mean(residuals), statistics.stdev(residuals)
    quantile = STUDENT_95[min(len(residuals) - 1, len(STUDENT_95)) - 1]
    half = quantile * deviation * (1.0 + 1.0 / len(residuals)) ** 0.5
    return max(mean - half, -CLOSED_FORM_ERROR), mean + half


INTERVAL = {kind: share_interval(tuple(rows.values())) for kind, rows in RESIDUALS.items()}
"""Of what is held on top of the allocated bytes, as a share of them: nine times in ten."""


def device_memory(allocated: float, kind: str) -> DeviceMemory:
    reserved = allocated * (1.0 + RESERVED_SHARE[kind])
    low, high = (allocated * (1.0 + share) + RUNTIME_BYTES[kind] for share in INTERVAL[kind])
    return DeviceMemory(
        allocated=allocated,
        reserved=reserved,
        device=reserved + RUNTIME_BYTES[kind],
        low=low,
        high=high,
    )


def allocatable(device_bytes: float, kind: str) -> float:
    """What tensors may take where a device has that much."""
    return (device_bytes - RUNTIME_BYTES[kind]) / (1.0 + RESERVED_SHARE[kind])
