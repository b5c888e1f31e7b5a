"""Bytes by phase of a whole job, of which a training step is one part.

    load      weights, and the tensor that is being converted, quantised or cut
    score     the base model alone, and what a scorer's pass holds
    train     loss, backward, optimizer (``costs/memory.py``)
    evaluate  with the training states resident: activations and logits of a pass, the cache of one
              that generates
    refresh   a scorer's pass with the training states resident
    save      what is held between steps; tensors are written from where they lie
    merge     an adapter added to its weights, a matrix at a time

The job's peak is the largest phase. Closed form throughout.

A sharded job (FSDP) loads with little memory: the model is built on the meta device, and each
tensor comes whole, is cut and dropped, so that a device never holds more than its shards and one
tensor. It evaluates as it trains, a layer gathered at a time; a checkpoint is sharded, each device
writing its own; a merge gathers the matrix at work. Scoring shards rows, not the model: each device
has all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thrifty.costs.held import state_bytes, state_bytes_of, turns_of
from thrifty.costs.memory import (
    TERMS,
    MemoryAccount,
    account,
    forward_account,
    kv_cache_bytes,
    largest_tensor,
    num_trained,
    peaks,
    weight_bytes,
)
from thrifty.costs.phases import Step
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.float64]


def job_account(
    shape: ModelShape,
    setting: MemorySetting,
    *,
    scoring_bytes: float = 0.0,
    looking_bytes: float = 0.0,
    generated_context: int = 0,
) -> MemoryAccount:
    """``scoring_bytes``: a scorer's peak with its weights; ``looking_bytes``: that of one that
    scores again while training; ``generated_context``: tokens that an evaluation's generation holds
    in its cache."""
    step = account(shape, setting)
    resident = _terms(**_resident(shape, setting))
    phases = {"load": _terms(**_load(shape, setting))}
    if scoring_bytes:
        own = own_bytes(shape, setting)
        phases["score"] = _terms(
            weights=min(own, scoring_bytes), activations=max(scoring_bytes - own, 0.0)
        )
    phases |= step.phases
    phases["evaluate"] = _added(resident, _evaluation(shape, _pass_of(setting, generated_context)))
    if looking_bytes:
        beside = scoring_beside(shape, setting, looking_bytes)
        phases["refresh"] = _added(resident, _terms(activations=beside))
    phases["save"] = resident
    if setting.adapter is not None:
        phases["merge"] = _terms(**_merge(shape, setting))
    return replace(step, phases=phases)


def job_peaks(
    shape: ModelShape,
    settings: Sequence[MemorySetting],
    micro_batches: Sequence[int],
    *,
    generated_context: int = 0,
) -> tuple[Bytes, Bytes, Bytes]:
    """The peak of ``job_account`` without scoring, for each setting and micro-batch, of one
    micro-batch a step and of several, [num_settings, num_batches] each; and what each setting holds
    between steps, [num_settings].

    The settings may differ in their optimizer alone, as in ``costs.memory.peaks``.
    """
    one, several = peaks(shape, settings, micro_batches)
    first = settings[0]
    rest = _resident(shape, first)
    rest_bytes = rest["weights"] + rest["adapter"]
    turns = turns_of(shape, first)
    states = [
        0.0
        if setting.states_offloaded
        else max(state_bytes_of(shape, turn, setting) for turn in turns)
        for setting in settings
    ]
    held = rest_bytes + np.array(states) / first.trained_shards
    passes = [_pass_of(first, generated_context)._replace(batch=size) for size in micro_batches]
    passing = np.array([sum(_evaluation(shape, each).values()) for each in passes])
    least = sum(_load(shape, first).values())
    if first.adapter is not None:
        least = max(least, sum(_merge(shape, first).values()))
    other = np.maximum(held[:, None] + passing, least)
    return np.maximum(one, other), np.maximum(several, other), held


def own_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of the model that scores: the base model, whole, in the dtype that is trained in."""
    return float(shape.num_parameters * setting.itemsize)


def scoring_beside(shape: ModelShape, setting: MemorySetting, scoring_bytes: float) -> float:
    """What a scorer's pass holds beside the base model."""
    return max(scoring_bytes - own_bytes(shape, setting), 0.0)


def _resident(shape: ModelShape, setting: MemorySetting) -> dict[str, float]:
    """What a device holds between steps."""
    adapter = 0.0
    if setting.adapter is not None:
        adapter = float(num_trained(shape, setting) * setting.trained_itemsize)
    held = {
        "weights": weight_bytes(shape, setting),
        "adapter": adapter,
        "optimizer_states": _state_bytes(shape, setting),
    }
    return {
        term: size / (setting.num_devices if term == "weights" else setting.trained_shards)
        for term, size in held.items()
    }


def _state_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    return 0.0 if setting.states_offloaded else state_bytes(shape, setting)


def _load(shape: ModelShape, setting: MemorySetting) -> dict[str, float]:
    """The weights, and a tensor on its way from the file to where it is quantised or cut: it comes
    whole, in bf16 or wider."""
    largest = largest_tensor(shape) if setting.storage is not None else 0
    if setting.num_devices > 1:
        largest = max(largest_tensor(shape), shape.head_parameters)
    return {
        "weights": weight_bytes(shape, setting) / setting.num_devices,
        "temporaries": float(largest * setting.itemsize),
    }


class _Pass(NamedTuple):
    """What of a setting an evaluation's pass depends on."""

    batch: int
    sequence: int
    dtype: str
    masked: bool
    device_kind: str
    chunked: bool
    num_devices: int
    context: int


def _pass_of(setting: MemorySetting, context: int) -> _Pass:
    return _Pass(
        setting.micro_batch,
        setting.sequence,
        setting.dtype,
        setting.masked,
        setting.device_kind,
        bool(setting.loss_chunk),
        setting.num_devices,
        context,
    )


@lru_cache(maxsize=1024)
def _evaluation(shape: ModelShape, of: _Pass) -> dict[str, float]:
    """Of a pass without gradients beside what is resident. Where the loss is chunked it is so here,
    and what a chunk takes is less than in training."""
    whole = forward_account(
        shape, of.batch, of.sequence, of.dtype, masked=of.masked, device_kind=of.device_kind
    )
    found = whole.phases["layers"] if of.chunked else whole.by_term
    cache = kv_cache_bytes(shape, of.batch, of.context, of.dtype) if of.context else 0.0
    gathered = 0.0
    if of.num_devices > 1:
        sharded = MemorySetting(
            dtype=of.dtype, num_devices=of.num_devices, device_kind=of.device_kind
        )
        gathered = Step(shape, sharded, (1,)).gathered
    return {
        **found,
        "weights": 0.0,
        "activations": found["activations"] + cache,
        "temporaries": found["temporaries"] + gathered,
    }


def _merge(shape: ModelShape, setting: MemorySetting) -> dict[str, float]:
    """The product of a matrix's adapters and its sum with it; sharded, the matrix itself too."""
    matrix = largest_tensor(shape) * float(max(setting.itemsize, setting.trained_itemsize))
    held = _resident(shape, setting)
    return {
        "weights": held["weights"],
        "adapter": held["adapter"],
        "temporaries": (3.0 if setting.num_devices > 1 else 2.0) * matrix,
    }


def _terms(**sizes: float) -> dict[str, float]:
    return dict.fromkeys(TERMS, 0.0) | sizes


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {term: one[term] + other[term] for term in TERMS}
