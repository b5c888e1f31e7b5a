"""What each memory technique takes in time beside AdamW on all weights, predicted and measured.

    OMP_NUM_THREADS=1 python bench/overheads.py [--rounds 5] [--only "lora,galore"]

A Llama with random weights, the same packs for all. In every round a cycle of the technique's steps
stands between two of the reference's, so that both see the same machine; the first round, in which
states are made, is not counted. The prediction is a ratio of ``step_seconds`` after `thrifty
device`. Ratios that differ by more than 10% between rounds print 'machine busy', and are no
measurement.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_plans
import memory
from material import heading
from thrifty import display
from thrifty.calibration import measure_device
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan import MemoryPlan
from thrifty.costs.hardware import Device
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.costs.time import step_seconds
from thrifty.memory_plan import Techniques

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
ROWS, LENGTH, STEPS = 4, 256, 4
PLAIN = dict(zip(MEMORY_KINDS, ("full", "float32", "keep", "whole", "adamw"), strict=True))
EACH_STEP: dict[str, dict[str, Any]] = {
    "badam": {"trained": {"badam": {"switch_steps": 1, "order": "ascending"}}},
    "lisa": {"trained": {"lisa": {"switch_steps": 1}}},
}
"""Blocks change at every step, so that a round is a cycle."""


def wanted(name: str) -> dict[str, Any]:
    """``training.memory`` of a way."""
    return {**PLAIN, **memory.ways()[name], **EACH_STEP.get(name, {})}


def setting_of(asked: dict[str, Any]) -> tuple[Techniques, MemorySetting]:
    techniques = Techniques.of(MemoryPlan(**asked))
    start = MemorySetting(micro_batch=ROWS, sequence=LENGTH, masked=True, device_kind="cpu")
    return techniques, techniques.setting(start)


class Pace:
    """Steps under one memory plan."""

    def __init__(self, base: Path, asked: dict[str, Any]) -> None:
        told = {"base": str(base), "memory": asked, "micro_batch": ROWS, "sequence": LENGTH}
        self.step: Callable[[int], None] = gpu_plans.stepper(told, "cpu")
        self.number = 0

    def seconds(self, steps: int) -> float:
        """Of the next steps, their mean."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step(self.number)
            self.number += 1
        return (time.perf_counter() - start) / steps


def ratios(base: Path, asked: dict[str, Any], rounds: int) -> list[float]:
    """Of seconds, to the reference's around it; one a round."""
    techniques, _ = setting_of(asked)
    steps = max(STEPS, techniques.trained.cycle_steps(read_shape(base)))
    plain, other = Pace(base, PLAIN), Pace(base, asked)
    plain.seconds(STEPS), other.seconds(steps)
    found, before = [], plain.seconds(STEPS)
    for _ in range(rounds):
        middle, after = other.seconds(steps), plain.seconds(STEPS)
        found.append(2 * middle / (before + after))
        before = after
    return found


def predicted(shape: ModelShape, device: Device, asked: dict[str, Any]) -> float:
    plain, other = setting_of(PLAIN)[1], setting_of(asked)[1]
    return step_seconds(shape, other, device) / step_seconds(shape, plain, device)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    display.quiet_libraries()
    device, rows, errors = measure_device(), [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        gpu_plans.make({"make": MODEL, "base": folder}, "cpu")
        shape = read_shape(base)
        for name in options.only.split(",") if options.only else list(memory.ways()):
            try:
                found = ratios(base, wanted(name), options.rounds)
            except ValueError as refusal:
                print(f"{name}: {str(refusal).partition(chr(10))[0]}", file=sys.stderr)
                continue
            ratio, told = statistics.median(found), predicted(shape, device, wanted(name))
            spread = (max(found) - min(found)) / ratio
            busy = ", machine busy" if spread > 0.1 else ""
            errors += [] if busy else [abs(told / ratio - 1)]
            row = (name, f"{told:.2f}", f"{ratio:.2f}", f"{told / ratio - 1:+.0%}")
            rows.append((*row, f"{spread:.0%}{busy}"))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(heading(f"Seconds a step beside AdamW on all weights, {ROWS} x {LENGTH} tokens"))
    print(display.table(("way", "predicted", "measured", "off", "rounds"), rows, right="lrrrr"))
    if errors:
        within = sum(error <= 0.15 for error in errors)
        print(
            f"{len(errors)} measured: median {statistics.median(errors):.0%}, worst "
            f"{max(errors):.0%}, {within} within 15%"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
