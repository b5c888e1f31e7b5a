"""Joules as the device counts them itself, where it does: NVML's energy counter.

Needs the package ``nvidia-ml-py`` and a GPU since Volta. Where either is missing, joules follow
from the device's design power instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def energy_counter() -> Callable[[], float] | None:
    """A function that returns the joules that all visible GPUs have used since their driver was
    loaded; None where nobody counts them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        counter = _Counter(pynvml, handles)
        counter()
    except Exception:  # no package, no driver, no GPU, an old one: NVML has an error for each
        return None
    return counter if handles else None


class _Counter:
    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    def __call__(self) -> float:
        used = (self._nvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in self._handles)
        return sum(used) / 1e3  # NVML counts millijoules
