"""Devices: what they can do, what they hold, what they draw and cost, each number with its source.

A known device comes from the table: dense peaks (no sparsity) of the vendor's data sheet. The local
one comes from `thrifty device`, which measures it and keeps the result in the cache folder; before
that it is a cautious guess and says so. Prices come from an editable, dated file; an unknown price
is None, never zero.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from thrifty.core.best_effort import keeping
from thrifty.core.durable import write_atomically

GIB = 2.0**30
LINK_SHARE = 0.8
"""Of a link's rate, what large copies reach."""
CACHE_VERSION = 5


@dataclass(frozen=True, kw_only=True)
class Device:
    """A processor that trains, in numbers."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: float
    flops_per_second: Mapping[str, float]
    """By dtype: the peak of large matrix products."""
    bytes_per_second: float
    """Memory bandwidth."""
    operation_seconds: float
    """What launching an operation takes, however small it is."""
    host_bytes_per_second: float = 1.2e10
    """Of the link to the host's memory, one way."""
    peer_bytes_per_second: float = 1.2e10
    """Of the links to other devices of the same machine, one way."""
    tdp_watts: float | None = None
    source: str = ""
    matmul_rates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """dtype -> size -> FLOP/s of a linear's forward, as measured; empty: from the peak by rule. The
    size is the smallest dimension; of a dtype that is emulated the side of a square weight."""
    gradient_rates: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)
    """The same of the backward, whose matrices lie otherwise: ``input`` (the gradient of what a
    linear reads), ``weight``, ``attention`` (by the size of a head); empty: as the forward."""
    emulated: tuple[str, ...] = ()
    """dtypes that the processor has no instructions for."""
    attention_rates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """dtype -> size of a head -> FLOP/s of fused attention, as measured."""
    fault_seconds: float = 0.0
    """Per byte of new pages: what a CPU pays for the first touch of memory just allocated."""
    factors: Mapping[str, tuple[float, float, float, float]] = field(default_factory=dict)
    """dtype -> of the roofline's terms (matrix products, memory-bound, launches, optimizer), as
    fitted to real steps; ones where they were not."""
    num_threads: int | None = None
    memory_factor: float = 1.0
    """Times a predicted peak that a run turned out to need, where one ran out of memory."""
    calibrated: bool = False
    machine_busy: bool = False
    """Repeats of the measurement differed by more than 10%."""
    measured_at: str = ""


def _gpu(
    name: str,
    memory: float,
    bf16: float,
    fp32: float,
    bandwidth: float,
    watts: float,
    links: tuple[float, float],
    source: str,
    *,
    fp16: float | None = None,
) -> Device:
    """Memory in GiB as the driver reports it, dense TFLOP/s, GB/s, watts; links to the host and to
    peers in GB/s one way, of which ``LINK_SHARE`` is reached."""
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=memory * GIB,
        flops_per_second={
            "bfloat16": bf16 * 1e12,
            "float16": (bf16 if fp16 is None else fp16) * 1e12,
            "float32": fp32 * 1e12,
        },
        bytes_per_second=bandwidth * 1e9,
        operation_seconds=6e-6,
        host_bytes_per_second=LINK_SHARE * links[0] * 1e9,
        peer_bytes_per_second=LINK_SHARE * links[1] * 1e9,
        tdp_watts=watts,
        source=source,
    )


# Usable memory in GiB as the driver reports it; dense bf16 tensor and plain fp32 TFLOP/s; GB/s; W;
# PCIe (3, 4, 5: 16, 32, 64) and NVLink or Infinity Fabric in GB/s one way.
DEVICES = {
    d.name: d
    for d in (
        _gpu("h100-sxm", 79.2, 989, 67, 3350, 700, (64, 450), "NVIDIA H100 data sheet"),
        _gpu("h100-pcie", 79.2, 756, 51, 2000, 350, (64, 64), "NVIDIA H100 data sheet"),
        _gpu("h200", 139.8, 989, 67, 4800, 700, (64, 450), "NVIDIA H200 data sheet"),
        _gpu("b200", 178.4, 2250, 75, 8000, 1000, (64, 900), "NVIDIA Blackwell data sheet"),
        _gpu("a100-80gb", 79.2, 312, 19.5, 2039, 400, (32, 300), "NVIDIA A100 data sheet"),
        _gpu("a100-40gb", 39.4, 312, 19.5, 1555, 400, (32, 300), "NVIDIA A100 data sheet"),
        _gpu("l40s", 44.4, 362, 91.6, 864, 350, (32, 32), "NVIDIA L40S data sheet"),
        _gpu("l4", 22.0, 121, 30.3, 300, 72, (32, 32), "NVIDIA L4 data sheet"),
        _gpu("a10g", 22.0, 70, 35, 600, 150, (32, 32), "AWS G5 description; NVIDIA A10 data sheet"),
        _gpu(
            "v100", 31.7, 0, 15.7, 900, 300, (16, 150), "NVIDIA V100 data sheet; no bf16", fp16=125
        ),
        _gpu("t4", 14.7, 0, 8.1, 320, 70, (16, 16), "NVIDIA T4 data sheet; no bf16", fp16=65),
        _gpu("rtx3090", 23.7, 71, 35.6, 936, 350, (32, 32), "NVIDIA GA102 whitepaper"),
        _gpu("rtx4090", 23.6, 165, 82.6, 1008, 450, (32, 32), "NVIDIA Ada whitepaper"),
        _gpu("rtx5090", 31.4, 210, 104.8, 1792, 575, (64, 64), "NVIDIA RTX Blackwell whitepaper"),
        _gpu("a6000", 47.5, 155, 38.7, 768, 300, (32, 32), "NVIDIA RTX A6000 data sheet"),
        _gpu("mi300x", 191.5, 1307, 163.4, 5300, 750, (64, 448), "AMD MI300X data sheet"),
    )
}
ALIASES = {"h100": "h100-sxm", "a100": "a100-80gb", "4090": "rtx4090", "3090": "rtx3090"}


HERE = ("cpu", "gpu", "cuda", "here", "this")
"""What people write for the machine at hand, which has no name."""


def load_device(name: str | None = None) -> Device:
    """A device of the table, or with None (or "local") this machine as measured. Case, spaces and
    hyphens do not matter.

    Raises ValueError for an unknown name, with the nearest known one or all of them.
    """
    if name is None or name == "local":
        return _as_learnt(_local(), "local")
    own = _own_devices()
    key = _plain(name)
    aliases = {alias: DEVICES[known] for alias, known in ALIASES.items()}
    for known, device in (*own.items(), *DEVICES.items(), *aliases.items()):
        if _plain(known) == key:
            return _as_learnt(device, device.name)
    names = sorted({*DEVICES, *ALIASES, *own})
    if key in HERE:
        raise ValueError(
            f"{name!r} names no device\nhint: leave --device out to plan for this machine's CPU, "
            f"or name a GPU: {', '.join(names)}"
        )
    close = difflib.get_close_matches(key, [_plain(each) for each in names], n=1, cutoff=0.75)
    meant = [each for each in names if _plain(each) in close]
    likely = f"did you mean {meant[0]}? " if meant else ""
    raise ValueError(
        f"the device {name!r} is not known\n"
        f"hint: {likely}known are {', '.join(names)}; describe another one in "
        f"{cache_folder() / 'devices.yaml'} as {_EXAMPLE}, or run `thrifty device` on it"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


_EXAMPLE = (
    "devices: {NAME: {memory_gib: 47.5, bfloat16_tflops: 155, float32_tflops: 38.7, "
    "bandwidth_gb_per_second: 768, watts: 300, host_link_gb_per_second: 32, "
    "peer_link_gb_per_second: 32}}"
)


def _own_devices() -> dict[str, Device]:
    """Those that the user describes. Raises ValueError, with an example, for a description that
    lacks something."""
    path = cache_folder() / "devices.yaml"
    if not path.is_file():
        return {}
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["devices"]
        return {
            name.lower(): _gpu(
                name.lower(),
                float(entry["memory_gib"]),
                float(entry["bfloat16_tflops"]),
                float(entry["float32_tflops"]),
                float(entry["bandwidth_gb_per_second"]),
                float(entry["watts"]),
                (
                    float(entry["host_link_gb_per_second"]),
                    float(entry["peer_link_gb_per_second"]),
                ),
                str(path),
            )
            for name, entry in entries.items()
        }
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not describe its devices: {type(error).__name__} {error}\n"
            f"hint: each needs all of {_EXAMPLE}"
        ) from None


def cache_folder() -> Path:
    """Where measurements and the user's prices are kept: THRIFTY_CACHE, or the platform's place;
    nowhere for a user who has no home."""
    given = os.environ.get("THRIFTY_CACHE")
    if given:
        return Path(given)
    try:
        if sys.platform == "win32":
            parent = Path(os.environ.get("LOCALAPPDATA") or Path.home())
        elif sys.platform == "darwin":
            parent = Path.home() / "Library" / "Caches"
        else:
            parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        parent = Path(os.devnull)  # in which nothing lies, and nothing can be put
    return parent / "thrifty"


def learn_memory_factor(name: str | None, needed: float, predicted: float) -> float:
    """A run on the device of that name held ``needed`` bytes when it ran out of memory, where
    ``predicted`` were to be its peak: plans count on so much more from now on, at most twice.
    Returns the factor that holds then; it is kept beside the device's measurements."""
    key = "local" if name in (None, "local") else load_device(name).name
    known = _memory_factors()
    found = max(known.get(key, 1.0), min(needed / predicted, 2.0) if predicted > 0 else 1.0)
    if found != known.get(key, 1.0):
        with keeping(cache_folder()):
            cache_folder().mkdir(parents=True, exist_ok=True)
            write_atomically(_memory_file(), json.dumps({**known, key: found}, indent=1))
    return found


def _as_learnt(device: Device, key: str) -> Device:
    factor = _memory_factors().get(key, 1.0)
    return device if factor == 1.0 else replace(device, memory_factor=factor)


def _memory_factors() -> dict[str, float]:
    try:
        values = json.loads(_memory_file().read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in values.items() if float(value) >= 1}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # nothing learnt, or nothing that can be read


def _memory_file() -> Path:
    return cache_folder() / "memory.json"


def _calibration_file() -> Path:
    return cache_folder() / "device.json"


def _local() -> Device:
    try:
        values = json.loads(_calibration_file().read_text(encoding="utf-8"))
        if values.pop("version") != CACHE_VERSION or values.keys() - {
            f.name for f in fields(Device)
        }:
            raise ValueError
        for name in ("matmul_rates", "attention_rates"):
            values[name] = _curves(values[name])
        of_gradients = values["gradient_rates"].items()
        values["gradient_rates"] = {what: _curves(found) for what, found in of_gradients}
        values["emulated"] = tuple(values["emulated"])
        values["factors"] = {dtype: tuple(four) for dtype, four in values["factors"].items()}
        return Device(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _cautious()  # none measured, or by another version: measure anew


def _curves(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """As they were: JSON knows no keys but strings."""
    return {
        dtype: {int(size): rate for size, rate in curve.items()} for dtype, curve in found.items()
    }


def _cautious() -> Device:
    return Device(
        name="local (not measured: run `thrifty device`)",
        kind="cpu",
        memory_bytes=_installed_memory(),
        flops_per_second={"float32": 4e10, "bfloat16": 1e10},
        bytes_per_second=8e9,
        operation_seconds=8e-6,
        fault_seconds=8e-10,
        source="a cautious guess at one CPU core",
    )


def _installed_memory() -> float:
    import psutil

    return float(psutil.virtual_memory().total)


def keep(device: Device) -> None:
    """Cache the local device's measurements."""
    folder = cache_folder()
    text = json.dumps({"version": CACHE_VERSION, **asdict(device)}, indent=1)
    with keeping(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(_calibration_file(), text)


@lru_cache
def _price_files() -> tuple[Mapping[str, Any], ...]:
    """The user's prices first, then those that come with thrifty."""
    found = []
    for path in (cache_folder() / "prices.yaml", Path(__file__).with_name("prices.yaml")):
        if path.is_file():
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if not isinstance(values, dict) or not isinstance(values.get("devices"), dict):
                raise ValueError(
                    f"{path} holds no prices\nhint: devices: {{NAME: {{dollars_per_hour: 2.5}}}}"
                )
            found.append(values["devices"])
    return tuple(found)


def dollars_per_hour(device: Device) -> float | None:
    """The list price of an hour, or None where it is unknown."""
    for devices in _price_files():
        entry = devices.get(device.name)
        if entry is not None:
            return float(entry["dollars_per_hour"])
    return None


def device_facts(device: Device) -> dict[str, Any]:
    """What `thrifty device` prints."""
    return {
        "name": device.name,
        "kind": device.kind,
        "memory_bytes": device.memory_bytes,
        "flops_per_second": dict(device.flops_per_second),
        "bytes_per_second": device.bytes_per_second,
        "operation_seconds": device.operation_seconds,
        "tdp_watts": device.tdp_watts,
        "dollars_per_hour": dollars_per_hour(device),
        "num_threads": device.num_threads,
        "memory_factor": device.memory_factor,
        "calibrated": device.calibrated,
        "machine_busy": device.machine_busy,
        "measured_at": device.measured_at,
        "source": device.source,
    }
