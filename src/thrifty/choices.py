"""What a request leaves open: the combinations, the scorers, the length of a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from thrifty.combinations import MICRO_BATCHES, Combinations, price_all, variants
from thrifty.core.contracts import MEMORY_KINDS, MemoryTechnique, Scorer
from thrifty.core.plan import LoRA
from thrifty.core.resolve import Spec, all_names, method_class, name_of, resolve
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.pricing import Request


def combinations_of(request: Request, sequence: int) -> Combinations:
    """All that the request leaves open. A run can be planned of what a run can train with; without
    a pool everything is priced, attention without a mask (flash attention over packs) included."""
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
    if runs_only and request.num_devices > 1:
        raise ValueError(
            f"{request.num_devices} devices are priced, but a run trains on one\n"
            "hint: plan without --pool to see their price, or leave --devices out"
        )
    masks = [True, False] if not runs_only and request.device.kind == "cuda" else [True]
    counts = [2**n for n in range(request.num_devices.bit_length())]
    layouts = [
        {"masked": masked, "num_devices": count, "reference": request.task == "preference"}
        for masked in masks
        for count in sorted({*(c for c in counts if c < request.num_devices), request.num_devices})
    ]
    found = price_all(
        request.shape,
        request.device,
        sequence=sequence,
        layouts=layouts,
        wanted=wanted,
        micro_batches=MICRO_BATCHES if size is None else (int(size),),
        runs_only=runs_only,
        generated_context=request.generated_context,
    )
    if not found.blocks:
        raise ValueError(_cannot_be_combined(_named(request).values(), found.refused))
    return found


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
    chosen = {kind: [name] for kind, name in _named(request).items()}
    if "weights" not in chosen and not _bf16_pays(request):
        chosen["weights"] = ["float32"]
    wanted = {kind: alternatives(request, kind, names) for kind, names in chosen.items()}
    trained = wanted.get("trained") or alternatives(request, "trained")
    if request.pool is not None:  # a run's adapters are float32, as PEFT's are
        trained = [t for t in trained if getattr(t, "adapter_dtype", "float32") == "float32"]
    return {**wanted, "trained": trained}


def _named(request: Request) -> dict[str, str]:
    """Kind -> the technique that the user named, with ``--using`` or as a key. Raises ValueError
    where two of one kind are named, or one that a key contradicts: a step has one of each."""
    said: dict[str, str] = {}
    for name in request.techniques:
        kind = _kind_of(name)
        if said.setdefault(kind, name) != name:
            raise ValueError(
                f"--using {said[kind]} and --using {name} cannot both hold: each is a way to have "
                f"the same part of a step ({kind})\n"
                "hint: name one of them, or neither to have all compared"
            )
    fixed = request.fixed
    recompute = fixed.get("training.activation_checkpointing")
    keys = (
        ("training.method", "trained", fixed.get("training.method")),
        ("training.dtype", "weights", fixed.get("training.dtype")),
        (
            "training.activation_checkpointing",
            "activations",
            None if recompute is None else ("recompute" if recompute else "keep"),
        ),
    )
    for key, kind, meant in keys:
        if not meant:
            continue
        named = said.setdefault(kind, str(meant))
        if _value_under(kind, named) != _value_under(kind, str(meant)):
            raise ValueError(
                f"{key}={fixed[key]} and --using {named} cannot both hold\n"
                "hint: leave one of them out"
            )
    return said


def _value_under(kind: str, name: str) -> Any:
    """What a technique makes of the plan.yaml value that goes with its kind."""
    setting = variants(kind, [name])[0].rewrite(MemorySetting(adapter=Adapter()))
    values = {"trained": name, "weights": setting.dtype, "activations": bool(setting.recompute)}
    return values[kind]


def alternatives(
    request: Request, kind: str, names: list[str] | None = None
) -> list[MemoryTechnique]:
    """Those named, or all, with the rank and targets that the request fixes."""
    found = variants(kind, names)
    if request.fixed.get("training.lora.rank") or request.fixed.get("training.lora.targets"):
        found = [_fitted(technique, lora_of(request)) for technique in found]
    return found


def _kind_of(technique: str) -> str:
    for kind in MEMORY_KINDS:
        if technique in all_names(kind):
            return kind
    known = ", ".join(name for kind in MEMORY_KINDS for name in all_names(kind))
    raise ValueError(f"there is no memory technique {technique!r}\nhint: one of {known}")


def _fitted(technique: MemoryTechnique, lora: LoRA) -> MemoryTechnique:
    """A LoRA technique with the rank and targets asked for."""
    if name_of(technique) != "lora":
        return technique
    return replace(technique, rank=lora.rank, targets=lora.targets)  # type: ignore[type-var]


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


def lora_of(request: Request) -> LoRA:
    rank = int(request.fixed.get("training.lora.rank") or LoRA.rank)
    targets = request.fixed.get("training.lora.targets") or request.shape.lora_targets
    return LoRA(rank=rank, targets=tuple(targets))
