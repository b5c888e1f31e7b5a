"""Bytes by phase of a whole job, of which a training step is one part.

    load      weights, and the tensor that is being converted or quantised
    score     the base model alone, and what a scorer's pass holds
    train     loss, backward, optimizer (``costs/memory.py``)
    evaluate  with the training states resident: activations and logits of a pass, the cache of one
              that generates
    refresh   a scorer's pass with the training states resident
    save      what is held between steps; tensors are written from where they lie
    merge     an adapter added to its weights, a matrix at a time

The job's peak is the largest phase. Closed form throughout.
"""

from __future__ import annotations

from dataclasses import replace

from thrifty.costs.memory import (
    TERMS,
    MemoryAccount,
    account,
    forward_account,
    kv_cache_bytes,
    largest_tensor,
    weight_bytes,
)
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


def job_account(
    shape: ModelShape,
    setting: MemorySetting,
    *,
    scoring_bytes: float = 0.0,
    refreshes: bool = False,
    generated_context: int = 0,
) -> MemoryAccount:
    """``scoring_bytes``: a scorer's peak with its weights; ``refreshes``: it scores again while
    training; ``generated_context``: tokens that an evaluation's generation holds in its cache."""
    step = account(shape, setting)
    between = _between(step)
    weights = weight_bytes(shape, setting)
    itemsize = setting.itemsize
    phases = {"load": _terms(weights=weights, temporaries=_staging(shape, setting))}
    own = float(shape.num_parameters * itemsize)
    if scoring_bytes:
        phases["score"] = _terms(weights=own, activations=max(scoring_bytes - own, 0.0))
    phases |= step.phases
    forward = forward_account(
        shape,
        setting.micro_batch,
        setting.sequence,
        setting.dtype,
        masked=setting.masked,
        device_kind=setting.device_kind,
    )
    passing = {**forward.by_term, "weights": 0.0}
    if setting.loss_chunk:  # the loss is chunked here as well
        passing = {**forward.phases["layers"], "weights": 0.0}
    cache = 0.0
    if generated_context:
        cache = kv_cache_bytes(shape, setting.micro_batch, generated_context, setting.dtype)
    phases["evaluate"] = _added(between, {**passing, "activations": passing["activations"] + cache})
    if refreshes and scoring_bytes:
        phases["refresh"] = _added(between, _terms(activations=max(scoring_bytes - own, 0.0)))
    phases["save"] = between
    if setting.adapter is not None:
        delta = largest_tensor(shape) * float(max(itemsize, setting.trained_itemsize))
        phases["merge"] = _terms(
            weights=weights, adapter=between["adapter"], temporaries=2.0 * delta
        )
    return replace(step, phases=phases)


def _between(step: MemoryAccount) -> dict[str, float]:
    """What is held between steps."""
    last = list(step.phases.values())[-1]
    return _terms(**{term: last[term] for term in ("weights", "adapter", "optimizer_states")})


def _staging(shape: ModelShape, setting: MemorySetting) -> float:
    """A tensor on its way from the file: it comes whole, in bf16 or wider."""
    quantised = setting.storage is not None
    return largest_tensor(shape) * float(setting.itemsize) if quantised else 0.0


def _terms(**sizes: float) -> dict[str, float]:
    return dict.fromkeys(TERMS, 0.0) | sizes


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {term: one[term] + other[term] for term in TERMS}
