"""The peak of the memory in use: of the GPU's allocator, or of this process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: str) -> None:
    """Start a new peak from the present level. On macOS and Windows the peak is the process's."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # 5 resets VmHWM, see proc(5)


def peak_memory_bytes(device: str) -> float:
    """Since ``reset_peak``: bytes allocated on the GPU, or resident in this process."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated())
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def peak_noted(lease: Meter, device: str) -> Iterator[None]:
    """Tick ``lease`` with the peak of the block."""
    reset_peak(device)
    yield
    lease.tick(Cost(peak_memory_bytes=peak_memory_bytes(device)))


def release_free_memory() -> None:
    """Give back what allocators keep of earlier work, so that it is not counted again."""
    gc.collect()
    arrow = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.default_memory_pool().release_unused()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def memory_bytes(device: str) -> float:
    """The present level."""
    if device == "cuda":
        import torch

        return float(torch.cuda.memory_allocated())
    import psutil

    return float(psutil.Process().memory_info().rss)
