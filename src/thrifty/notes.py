"""What one should know of a plan before its numbers are believed, a line each, said once: rows that
measure too little, a device that was measured while it was busy, a config that leaves sizes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from thrifty.core import quantities
from thrifty.core.budget import Budget, PoolStats
from thrifty.core.objective import Objective
from thrifty.core.plan import Target
from thrifty.costs import families
from thrifty.costs.hardware import Device

FEW_ROWS = 16
"""Fewer dev rows than these say little: one odd row moves their loss."""


def of_config(config: Mapping[str, Any]) -> Iterator[str]:
    """``config``: a model's config.json."""
    yield from families.notes(config)


def of_device(device: Device, budget: Budget) -> Iterator[str]:
    if device.machine_busy:
        yield (
            f"{device.name} was measured while the machine was busy, so predicted seconds may be "
            "off; run `thrifty device` again when it is quiet"
        )
    limit = budget.memory_bytes
    if limit is not None and limit > device.memory_bytes:
        yield (
            f"{device.name} has {quantities.format_bytes(device.memory_bytes)}, less than the "
            f"memory limit of {quantities.format_bytes(limit)}: "
            + (
                "the plan keeps to what it has"
                if device.kind == "cuda"
                else "the plan is for a machine with more; --device NAME names one"
            )
        )


def of_objective(objective: Objective, dev: PoolStats | None) -> Iterator[str]:
    """``dev``: all dev rows together."""
    if dev is None or not objective.answers:
        return
    rows = dev.num_examples
    yield (
        f"every evaluation generates an answer of up to {objective.max_new_tokens:,} tokens to "
        f"each of {rows:,} dev rows, and is predicted as if each had all of them; {objective.name} "
        f"over so many rows has a standard error of up to {0.5 / rows**0.5:.3f}"
    )
    if (serving := objective.serving) is not None:
        yield (
            f"every evaluation draws {serving.dev_samples:,} samples of each answer as well; a "
            f"sample of each of {serving.questions:,} questions is set aside, and training stops "
            "where more of them are the better buy"
        )


def of_rows(targets: Mapping[str, Target], num_dev: Mapping[str, int]) -> Iterator[str]:
    """``num_dev`` has the dev rows of each target, or of the pool where there is none."""
    if not targets:
        yield (
            f"no --target: {sum(num_dev.values()):,} rows of the pool itself are held out as dev "
            "rows; --target ROWS says what the model should become good at"
        )
    untested = [name for name, target in targets.items() if not target.test]
    if untested:
        yield (
            f"no --test for {', '.join(untested)}: gains will be measured on dev rows, which steer "
            "training and so flatter it; --test NAME=ROWS gives rows that are looked at once"
        )
    for name, number in num_dev.items():
        if number < FEW_ROWS:
            yield (
                f"{name} has {number:,} dev row{'s' if number > 1 else ''}: a loss over so few is "
                f"mostly noise; {FEW_ROWS} or more can steer training"
            )
