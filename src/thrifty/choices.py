"""What a request leaves open: the combinations, the scorers, the length of a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from thrifty.combinations import (
    MICRO_BATCHES,
    Combinations,
    missing_packages,
    price_all,
    variants,
)
from thrifty.core.contracts import MEMORY_KINDS, MemoryTechnique, Scorer
from thrifty.core.plan import put
from thrifty.core.plan_switch import asks_others
from thrifty.core.quantities import show
from thrifty.core.resolve import Spec, all_names, method_class, name_of, parse_spec, resolve
from thrifty.costs.setting import MemorySetting
from thrifty.pair_costs import LOGITS_AT_A_TIME, SIDES, why_no_pairs
from thrifty.request import Request


def combinations_of(request: Request, sequence: int) -> Combinations:
    """All that the request leaves open. A run can be planned of what a run can train with; without
    a pool everything is priced, attention without a mask (flash attention over packs) included.
    Where the device is slower in bfloat16 it is all in float32, unless nothing in that fits."""
    fixed, runs_only = request.fixed, request.pool is not None
    size = fixed.get("training.per_device_train_batch_size")
    wanted = _wanted(request)
    for kind, techniques in wanted.items():
        if runs_only and not any(technique.runs for technique in techniques):
            names = ", ".join(sorted({name_of(technique) for technique in techniques}))
            raise ValueError(
                f"{names} ({kind}) is priced, but a run cannot train with it yet\n"
                "hint: plan without --pool to see its price, or leave it out"
            )
        if runs_only and (missing := missing_packages(techniques)):
            raise ValueError(
                f"{name_of(techniques[0])} takes {missing}, which is not installed\n"
                f"hint: pip install 'thrifty[{missing}]', or leave it out"
            )
    sides = 1 if request.preference is None else SIDES
    if request.preference is not None:
        for kind in ("trained", "loss"):
            _check_pairs(request, wanted.get(kind, []))
    masks = [True, False] if not runs_only and request.device.kind == "cuda" else [True]
    counts = [2**n for n in range(request.num_devices.bit_length())]
    layouts: list[dict[str, Any]] = [
        {"masked": masked, "num_devices": count, "reference": request.asks_reference}
        for masked in masks
        for count in sorted({*(c for c in counts if c < request.num_devices), request.num_devices})
    ]
    if runs_only:
        layouts = [{**layouts[0], **layout} for layout in _of_runs(request)]
    price = partial(
        price_all,
        request.shape,
        request.device,
        sequence=sequence,
        layouts=layouts,
        micro_batches=[sides * rows for rows in (MICRO_BATCHES if size is None else [int(size)])],
        runs_only=runs_only,
        accumulated=int(fixed.get("training.gradient_accumulation_steps", 1)),
        generated_context=request.generated_context,
    )
    allowed = {**_switching(request), **wanted}
    if "weights" in wanted or _bf16_pays(request):
        found = price(wanted=allowed)
    else:
        found = price(wanted={**allowed, "weights": variants("weights", ["float32"])})
        if not found.fits(request.most_allocated):
            found = price(wanted=allowed)
    if not found.blocks:
        raise ValueError(_cannot_be_combined(_names(request), found.refused))
    return found


def _of_runs(request: Request) -> list[dict[str, int]]:
    """How a run may lie on its devices: each with everything, or with a share of it."""
    count = request.num_devices
    ways = {
        "ddp": {"num_devices": 1, "replicas": count},
        "fsdp": {"num_devices": count, "replicas": 1},
    }
    if count == 1 or request.preference is not None:
        return [ways["ddp"]]
    wanted = request.fixed.get("training.parallel")
    return [layout for name, layout in ways.items() if wanted in (None, name)]


def _check_pairs(request: Request, named: Sequence[MemoryTechnique]) -> None:
    """Raise ValueError where none of what the user named of a kind trains on pairs."""
    start = MemorySetting(
        reference=request.asks_reference,
        replicas=1 if request.pool is None else request.num_devices,
        device_kind=request.device.kind,
    )
    reasons = [why_no_pairs(each.rewrite(start)) for each in named] or [why_no_pairs(start)]
    if all(reasons):
        raise ValueError(f"task preference: {reasons[0]}\nhint: another technique, or one device")


def _names(request: Request) -> list[str]:
    """Of the techniques that the user named."""
    return [parse_spec(kind, spec)[0] for kind, spec in _named(request).items()]


def _cannot_be_combined(names: Iterable[str], refused: Mapping[str, int]) -> str:
    """With the reasons that the named techniques themselves give."""
    named = {*names}
    told = [reason for reason in refused if reason.split(":")[0] in named] or list(refused)
    return (
        f"what is asked for cannot be combined: {'; '.join(told)}\n"
        "hint: leave one of them out, or name what it needs instead"
    )


def _wanted(request: Request) -> dict[str, list[MemoryTechnique]]:
    """Kind -> techniques, where the request fixes them."""
    chosen = _named(request)
    if request.preference is not None and "loss" not in chosen:
        chosen["loss"] = {"chunked": {"tokens": LOGITS_AT_A_TIME}}
    return {kind: alternatives(kind, spec) for kind, spec in chosen.items()}


def _switching(request: Request) -> dict[str, list[MemoryTechnique]]:
    """Kind -> techniques that a search may choose where something else may be trained on the way:
    those that a run can go over from, on weights that an adapter merges into."""
    if not asks_others(request.fixed):
        return {}
    trained: list[Any] = variants("trained")
    weights: list[Any] = variants("weights")
    return {
        "trained": [each for each in trained if each.switches],
        "weights": [each for each in weights if each.merges],
    }


def _named(request: Request) -> dict[str, Spec]:
    """Kind -> the technique that the user named, with ``--using`` or as a key. Raises ValueError
    where two of one kind are named, or one that a key contradicts: a step has one of each."""
    said: dict[str, Spec] = {}
    for name in request.techniques:
        kind = _kind_of(name)
        if said.setdefault(kind, name) != name:
            raise ValueError(
                f"--using {said[kind]} and --using {name} cannot both hold: each is a way to have "
                f"the same part of a step ({kind})\n"
                "hint: name one of them, or neither to have all compared"
            )
    for kind in MEMORY_KINDS:
        meant = _fixed_technique(request, kind)
        if meant is None:
            continue
        named = said.setdefault(kind, meant)
        if parse_spec(kind, named)[0] != parse_spec(kind, meant)[0]:
            raise ValueError(
                f"training.memory.{kind}={show(meant)} and --using {named} cannot both hold\n"
                "hint: leave one of them out"
            )
        said[kind] = meant
    return said


def _fixed_technique(request: Request, kind: str) -> Spec | None:
    """What the user set under ``training.memory``: a technique, or some of its options."""
    key, values = f"training.memory.{kind}", dict[str, Any]()
    for name, value in request.fixed.items():
        if name == key or name.startswith(f"{key}."):
            put(values, name, value)
    return values["training"]["memory"][kind] if values else None


def alternatives(kind: str, spec: Spec) -> list[MemoryTechnique]:
    """A technique that is named alone in all forms that a search tries, one with options as it
    is."""
    name, options = parse_spec(kind, spec)
    return [resolve(kind, spec)] if options else variants(kind, [name])


def _kind_of(technique: str) -> str:
    for kind in MEMORY_KINDS:
        if technique in all_names(kind):
            return kind
    known = ", ".join(name for kind in MEMORY_KINDS for name in all_names(kind))
    raise ValueError(f"there is no memory technique {technique!r}\nhint: one of {known}")


def _bf16_pays(request: Request) -> bool:
    """Where the device is no slower in it."""
    rate = request.device.flops_per_second
    return rate.get("bfloat16", 0.0) >= 0.9 * rate.get("float32", 0.0)


def scorers_of(request: Request) -> Iterator[tuple[Spec, Scorer]]:
    """Those that make sense here; a scorer that the user named must."""
    spec = request.fixed.get("selection.scorer")
    if spec is not None:
        scorer = resolve("scorer", spec)
        if scorer.needs_target and not request.targets:
            raise ValueError(
                f"scorer {name_of(scorer)} needs a target\n"
                "hint: --target ROWS like those the model should become good at, or scorer uniform"
            )
        yield spec, scorer
        return
    if request.pool is None:
        yield "uniform", resolve("scorer", "uniform")
        return
    for name in all_names("scorer"):
        cls: Any = method_class("scorer", name)
        if request.task in cls.tasks and not (cls.needs_target and not request.targets):
            yield name, cls()


def sequence_of(request: Request) -> int:
    """Tokens of a packed sequence: the power of two that holds the longest example, at most 2048
    and the model's context."""
    fixed = request.fixed.get("training.max_length")
    context = request.shape.max_position_embeddings
    if fixed is not None:
        if fixed > context:
            raise ValueError(
                f"training.max_length {fixed} is longer than the model's context of {context}\n"
                f"hint: at most {context}"
            )
        return int(fixed)
    longest = request.pool.max_tokens if request.pool else 1024
    return min(max(64, 2 ** math.ceil(math.log2(max(longest, 1)))), 2048, context)
