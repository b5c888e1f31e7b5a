"""What binds a chosen way to hold a step, and the ways out: what each other technique would free
and cost, and what would fit on smaller and larger devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import numpy as np

from thrifty.combinations import Combinations, Neighbours, variants
from thrifty.core import quantities
from thrifty.core.contracts import MEMORY_KINDS, MemoryTechnique
from thrifty.core.resolve import name_of
from thrifty.costs.allocator import allocatable
from thrifty.costs.hardware import DEVICES
from thrifty.costs.job import job_account
from thrifty.costs.memory import MemoryAccount
from thrifty.predictions import DISK_BYTES_PER_SECOND
from thrifty.pricing import Candidate
from thrifty.request import MEMORY_MARGIN, Request

WORTH_A_LINE = 0.01
"""Of the peak: what frees less is not told."""
_UNBUILT = " (priced; a run cannot do that yet)"
ABOUT_AS_MUCH = 0.99
"""Of what another frees."""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One technique in another's place, all else as it is."""

    kind: str
    name: str
    differs: str
    """From what there is, where that has the same name."""
    frees_bytes: float
    """Of the job's peak."""
    frees_of_binding_term_bytes: float
    """Of the largest term there, at the phase that binds now."""
    slows: float
    """Seconds a token over those without it, less one."""
    quality: float
    """Worth of a token, over that without it."""
    runs: bool


@dataclass(frozen=True, kw_only=True)
class Relief:
    """A way out where scoring takes most."""

    way: Literal["proxy", "offload", "evict"]
    frees_bytes: float
    seconds: float | None
    """Of a batch, or of a refresh; None where it saves time."""
    text: str


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
    """The phase of the job at whose peak most is held, and the largest term there."""
    terms = chosen.account.by_term
    return chosen.account.peak_phase, max(terms, key=lambda term: terms[term])


def scoring_relief(account: MemoryAccount, request: Request) -> list[Relief]:
    """Ways out where it is scoring, not training, that takes most of a job: a smaller proxy, or
    what lies beside the pass off the device meanwhile."""
    if account.peak_phase not in ("score", "refresh"):
        return []
    link, shown, time = (
        request.device.host_bytes_per_second,
        quantities.format_bytes,
        quantities.format_seconds,
    )
    own = account.phases["score"]["weights"]
    ways = [
        Relief(
            way="proxy",
            frees_bytes=0.9 * own,
            seconds=None,
            text=f"a proxy of a tenth of the size frees about {shown(0.9 * own)} of scoring, and "
            "its scores serve a larger model too: model, of the scorer's options",
        )
    ]
    if account.peak_phase == "refresh":
        states = account.phases["save"]["optimizer_states"]  # the weights score
        reading = states / DISK_BYTES_PER_SECOND
        return [
            *ways,
            Relief(
                way="offload",
                frees_bytes=states,
                seconds=2 * states / link,
                text=f"the training states wait on the host: frees {shown(states)} for "
                f"{time(2 * states / link)} a refresh{_UNBUILT}",
            ),
            Relief(
                way="evict",
                frees_bytes=states,
                seconds=reading,
                text=f"evict them to the last checkpoint: frees {shown(states)} for "
                f"{time(reading)} of loading it again a refresh{_UNBUILT}",
            ),
        ]
    return [
        *ways,
        Relief(
            way="offload",
            frees_bytes=own,
            seconds=own / link,
            text="the scoring model waits on the host, a layer here at a time: frees up to "
            f"{shown(own)} for {time(own / link)} a batch{_UNBUILT}",
        ),
        Relief(
            way="evict",
            frees_bytes=0.0,
            seconds=0.0,
            text="there is nothing to evict, as rows are scored before the training states exist",
        ),
    ]


def swaps(chosen: Candidate, request: Request, combinations: Combinations) -> list[Swap]:
    """Single changes that free at least a hundredth of the peak: those that take from the binding
    term first, then those of most worth and least time. Techniques that the user fixed are
    exchanged as well."""
    own, setting = chosen.held, chosen.setting
    phase, term = binding_term(chosen)
    index = own.micro_batches.index(setting.micro_batch)
    neighbours = Neighbours(
        combinations=combinations,
        shape=request.shape,
        device=request.device,
        generated_context=request.generated_context,
    )
    found: dict[tuple[str, str], Swap] = {}
    for place, kind in enumerate(MEMORY_KINDS):
        for technique in variants(kind):
            techniques = [*own.techniques]
            if technique == techniques[place]:
                continue
            techniques[place] = technique
            other = neighbours.of(own, techniques)
            if other is None:
                continue
            steps = min(setting.gradient_accumulation_steps, other.most_accumulated)
            account = job_account(
                request.shape,
                replace(other.setting(index), gradient_accumulation_steps=steps),
                scoring_bytes=chosen.scoring_bytes,
                looking_bytes=chosen.looking_bytes,
                generated_context=chosen.generated_context,
            )
            swap = Swap(
                kind=kind,
                name=name_of(technique),
                differs=_differs(technique, own.techniques[place]),
                frees_bytes=chosen.account.peak_memory_bytes - account.peak_memory_bytes,
                frees_of_binding_term_bytes=chosen.account.by_term[term]
                - account.phases.get(phase, account.by_term)[term],
                slows=float(other.seconds_a_row[index] / own.seconds_a_row[index] - 1.0),
                quality=other.quality.mean / own.quality.mean,
                runs=other.runs,
            )
            known = found.get((kind, swap.name))
            if known is None or known.frees_bytes < swap.frees_bytes:
                found[kind, swap.name] = swap
    least = WORTH_A_LINE * chosen.account.peak_memory_bytes
    return sorted(
        (swap for swap in found.values() if swap.frees_bytes >= least),
        key=lambda s: (
            s.frees_of_binding_term_bytes < least,
            -round(s.quality, 2),
            s.slows,
            -s.frees_bytes,
        ),
    )


def unbeaten(found: Sequence[Swap]) -> list[Swap]:
    """Those that no other replaces: one that frees as much, of what binds too, in less time."""
    return [each for each in found if not any(_beats(other, each) for other in found)]


def _beats(one: Swap, other: Swap) -> bool:
    return (
        one.frees_bytes >= ABOUT_AS_MUCH * other.frees_bytes
        and one.frees_of_binding_term_bytes >= ABOUT_AS_MUCH * other.frees_of_binding_term_bytes
        and one.slows < other.slows
        and one.quality >= other.quality
        and one.runs >= other.runs
    )


def _differs(technique: MemoryTechnique, own: MemoryTechnique) -> str:
    """In what a technique differs from one of the same name; nothing where the name says it."""
    if type(technique) is not type(own):
        return ""
    values = [(each.name, getattr(technique, each.name)) for each in fields(cast(Any, technique))]
    return ", ".join(f"{name} {value}" for name, value in values if value != getattr(own, name))


def elsewhere(
    request: Request, combinations: Combinations, scoring_bytes: float
) -> list[Elsewhere]:
    """The next smaller and the next larger device of the table: its best quality that fits, and of
    that the fastest, scoring included. Sizes of a GPU's tensors hold on another; speeds are
    compared as here."""
    if request.device.kind != "cuda":
        return []
    sizes = sorted(DEVICES.values(), key=lambda device: device.memory_bytes)
    limit = request.memory_limit
    smaller = [device for device in sizes if device.memory_bytes < 0.95 * limit]
    larger = [device for device in sizes if device.memory_bytes > 1.05 * limit]
    return [
        _best(device.name, device.memory_bytes, combinations, scoring_bytes)
        for device in (*smaller[-1:], *larger[:1])
    ]


def _best(
    name: str, memory_bytes: float, combinations: Combinations, scoring_bytes: float
) -> Elsewhere:
    most = allocatable(memory_bytes / MEMORY_MARGIN, "cuda")
    columns = combinations.columns
    fits = np.flatnonzero((columns.alone <= most) & (columns.num_devices == 1))
    if scoring_bytes > most or not len(fits):
        return Elsewhere(device=name, memory_bytes=memory_bytes, techniques=None)
    worth = columns.quality[fits].round(3)
    finest = fits[worth == worth.max()]
    held, index = combinations.at(int(finest[np.argmin(columns.seconds[finest])]))
    return Elsewhere(
        device=name,
        memory_bytes=memory_bytes,
        techniques=held.technique_names,
        micro_batch=held.micro_batches[index],
        quality=held.quality.mean,
    )
