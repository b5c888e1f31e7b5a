"""What binds a chosen way to hold a step, and the ways out: what each other technique would free
and cost, and what would fit on smaller and larger devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from thrifty.combinations import Combinations, Held
from thrifty.core import quantities
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.costs.allocator import allocatable
from thrifty.costs.hardware import DEVICES
from thrifty.pricing import MEMORY_MARGIN, Candidate, Request


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One technique in another's place, all else as it is."""

    kind: str
    name: str
    frees_bytes: float
    """Negative: it takes more."""
    slows: float
    """Seconds a token over those without it, less one."""
    quality: float
    """Worth of a token, over that without it."""
    runs: bool


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """The best that fits on another device."""

    device: str
    memory_bytes: float
    techniques: Mapping[str, str] | None
    """None: nothing fits."""
    micro_batch: int = 0
    quality: float = 0.0


def binding_term(chosen: Candidate) -> tuple[str, str]:
    """The phase of the job at whose peak most is held, and the largest term there but weights."""
    account = chosen.account
    terms = {term: size for term, size in account.by_term.items() if term != "weights"}
    return account.peak_phase, max(terms, key=lambda term: terms[term])


def scoring_relief(chosen: Candidate, request: Request) -> list[str]:
    """Ways out where it is scoring, not training, that takes most: a smaller proxy, whose scores
    serve a larger model too; or, where rows are scored again while training, the training states
    off the device meanwhile."""
    account, shown = chosen.account, quantities.format_bytes
    if account.peak_phase not in ("score", "refresh"):
        return []
    own = account.phases["score"]["weights"]
    ways = [f"a proxy of a tenth of the size frees about {shown(0.9 * own)} of scoring"]
    if account.peak_phase == "refresh":
        states = account.phase_bytes("save")
        link = request.device.host_bytes_per_second
        ways.append(
            f"the training states wait on the host: frees {shown(states)} for "
            f"{quantities.format_seconds(2 * states / link)} a refresh"
        )
        ways.append("evict them to the last checkpoint: the same, for loading it again")
    return ways


def swaps(chosen: Candidate, combinations: Combinations) -> list[Swap]:
    """Single changes that free memory, those of most worth and least time first."""
    found: dict[tuple[str, str], Swap] = {}
    own = chosen.held
    for held in combinations.held:
        if (held.masked, held.num_devices) != (own.masked, own.num_devices):
            continue
        pairs = zip(MEMORY_KINDS, own.techniques, held.techniques, strict=True)
        changed = [kind for kind, one, other in pairs if one != other]
        if len(changed) != 1:
            continue
        swap = _swap(changed[0], own, held, chosen.setting.micro_batch)
        known = found.get((swap.kind, swap.name))
        if swap.frees_bytes > 0 and (known is None or known.frees_bytes < swap.frees_bytes):
            found[swap.kind, swap.name] = swap
    return sorted(found.values(), key=lambda s: (-round(s.quality, 2), s.slows, -s.frees_bytes))


def _swap(kind: str, own: Held, other: Held, micro_batch: int) -> Swap:
    index = own.micro_batches.index(micro_batch)
    return Swap(
        kind=kind,
        name=other.technique_names[kind],
        frees_bytes=own.peak(index, False) - other.peak(index, False),
        slows=float(other.seconds_a_row[index] / own.seconds_a_row[index] - 1.0),
        quality=other.quality.mean / own.quality.mean,
        runs=all(technique.runs for technique in other.techniques),
    )


def elsewhere(request: Request, combinations: Combinations) -> list[Elsewhere]:
    """The next smaller and the next larger device of the table: its best quality that fits, and of
    that the fastest. Sizes of a GPU's tensors hold on another; speeds are compared as here."""
    if request.device.kind != "cuda":
        return []
    sizes = sorted(DEVICES.values(), key=lambda device: device.memory_bytes)
    limit = request.memory_limit
    smaller = [device for device in sizes if device.memory_bytes < 0.95 * limit]
    larger = [device for device in sizes if device.memory_bytes > 1.05 * limit]
    return [
        _best(device.name, device.memory_bytes, combinations)
        for device in (*smaller[-1:], *larger[:1])
    ]


def _best(name: str, memory_bytes: float, combinations: Combinations) -> Elsewhere:
    most = allocatable(memory_bytes / MEMORY_MARGIN, "cuda")
    best: tuple[tuple[float, float], Held, int] | None = None
    for held in combinations.held:
        if held.num_devices > 1:
            continue
        fits = np.flatnonzero(held.block.peaks[held.state] <= most)
        if not len(fits):
            continue
        index = int(fits[np.argmin(held.seconds_a_row[fits])])
        rank = (-round(held.quality.mean, 3), float(held.seconds_a_row[index]))
        if best is None or rank < best[0]:
            best = rank, held, index
    if best is None:
        return Elsewhere(device=name, memory_bytes=memory_bytes, techniques=None)
    _, held, index = best
    return Elsewhere(
        device=name,
        memory_bytes=memory_bytes,
        techniques=held.technique_names,
        micro_batch=held.micro_batches[index],
        quality=held.quality.mean,
    )
