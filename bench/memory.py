"""What training under each memory technique brings and takes, beside AdamW on all weights.

    OMP_NUM_THREADS=1 python bench/memory.py DATA [--steps 200] [--only "lora,galore"] [--seeds 1]

Model: stories260K. Rows: uniform ones of the mixed pool, target mathematics; every way trains the
same packs for as many steps, at the rate that the planner's rule gives it, or at --rate times that.
'dev' is the loss on the target's dev rows after training, where it was lowest. FLOPs a step are
counted, in those of the reference; bytes and seconds a step are predicted and measured, in ratios
to the reference's of the same seed. Bytes measured: the rise of resident memory while training.

Rows are appended to --results as they come, so that several processes can share the work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from material import heading
from mix import write_targets
from thrifty import display, stages
from thrifty.core.budget import Budget
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan import Target
from thrifty.core.resolve import all_names, method_class
from thrifty.preparation import Asked, plan_run
from thrifty.run_folder import RunFolder

REFERENCE = "adamw"
ON_ADAPTERS = {"int8", "nf4", "fp8"}
"""Weights that cannot be trained themselves."""
NARROW = {"adamw_bf16"}
"""Optimizers for weights in bfloat16."""
BESIDE = {"mezo": {"states": "sgd"}, "addax": {"states": "lomo"}, "loftq": {"weights": "nf4"}}
"""What some cannot do without."""
SMALLER: dict[str, dict[str, Any]] = {
    "galore": {"rank": 16},
    "apollo": {"rank": 16},
    "q_galore": {"rank": 16},
    "badam": {"switch_steps": 20},
    "adalora": {"last_cut": 150},
    "adapters": {"rank": 32},
    "addax": {"short": 96},
}
"""The model is 64 wide, where the usual ranks would save nothing, the run is short, and a third of
the rows have no more than 96 tokens."""


def ways() -> dict[str, dict[str, Any]]:
    """Name -> ``training.memory``: each technique that a run can train with, alone."""
    found: dict[str, dict[str, Any]] = {REFERENCE: {}}
    for kind in MEMORY_KINDS:
        for name in all_names(kind):
            cls: Any = method_class(kind, name)
            if not cls.runs:
                continue
            memory: dict[str, Any] = {kind: {name: SMALLER[name]} if name in SMALLER else name}
            if name in ON_ADAPTERS:
                memory["trained"] = "lora"
            if name in NARROW:
                memory["weights"] = "bfloat16"
            if name not in found:
                found[name] = {**memory, **BESIDE.get(name, {})}
    del found["full"], found["keep"], found["whole"], found["float32"]  # the reference
    return found


def asked(data: Path, home: Path, memory: dict[str, Any], steps: int, seed: int) -> Asked:
    pool = home / "pool.parquet"
    if not pool.exists():
        table = pq.read_table(data / "mix" / "pool.parquet")
        rows = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:6000])
        pq.write_table(table.take(rows).select(["prompt", "response"]), pool)
        write_targets(data, home)
    dev, test = ((str(home / f"math-{part}.parquet"),) for part in ("dev", "test"))
    fixed = {
        **{
            f"training.memory.{kind}": memory.get(kind, plain)
            for kind, plain in zip(
                MEMORY_KINDS, ("full", "float32", "keep", "whole", "adamw"), strict=True
            )
        },
        "selection.scorer": "uniform",
        "training.max_length": 256,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": steps,
        "training.eval_steps": max(1, steps // 4),
        "training.save_steps": steps,
        "training.seed": seed,
        "selection.seed": seed,
    }
    return Asked(
        model=str(data / "stories260K-hf"),
        pool=(str(pool),),
        targets={"math": Target(signal=dev, dev=dev, test=test)},
        budget=Budget(flops=1e15),
        fixed=fixed,
    )


def measured(options: argparse.Namespace, home: Path, name: str, seed: int) -> dict[str, Any]:
    folder = home / f"run-{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    wanted = asked(options.data, home, ways()[name], options.steps, seed)
    plan = plan_run(wanted, folder, quiet)[2]
    if options.rate != 1.0:
        rate = plan.training.learning_rate * options.rate
        wanted = Asked(
            **{**vars(wanted), "fixed": {**wanted.fixed, "training.learning_rate": rate}}
        )
        shutil.rmtree(folder)
        plan = plan_run(wanted, folder, quiet)[2]
    with stages.at_work(RunFolder(folder), quiet) as work:
        stages.select(work, work.main)
        stages.train(work, work.main)
        step = work.predicted(work.plan).step
        book = work.ledger
        trained = book.spent(activity="train")
        steps = max(e["step"] for e in book.evaluations())
        losses = [e["objective"] for e in book.evaluations()]
    shutil.rmtree(folder)
    return {
        "name": name,
        "seed": seed,
        "rate": plan.training.learning_rate,
        "dev": min(losses),
        "before": losses[0],
        "flops": trained.flops / steps,
        "seconds": trained.seconds / steps,
        "bytes": trained.peak_memory_bytes,
        "predicted_flops": step.flops,
        "predicted_seconds": step.seconds,
        "predicted_bytes": step.peak_memory_bytes,
    }


def quiet(line: str) -> None:
    """Says nothing."""


def read(results: Path) -> list[dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


def table(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    reference = {r["seed"]: r for r in results if r["name"] == REFERENCE}
    results = [r for r in results if r["seed"] in reference]
    for name in dict.fromkeys(r["name"] for r in results):
        rows = [r for r in results if r["name"] == name]

        def ratio(key: str, rows: list[dict[str, Any]] = rows) -> str:
            return f"{statistics.mean(r[key] / reference[r['seed']][key] for r in rows):.2f}"

        lost = [r["dev"] - reference[r["seed"]]["dev"] for r in rows]
        yield (
            name,
            str(len(rows)),
            f"{rows[0]['rate']:.2g}",
            f"{statistics.mean(r['dev'] for r in rows):.3f}",
            f"{statistics.mean(lost):+.3f}",
            ratio("flops"),
            f"{statistics.mean(r['flops'] / r['predicted_flops'] - 1 for r in rows):+.1%}",
            ratio("predicted_bytes"),
            ratio("bytes"),
            ratio("predicted_seconds"),
            ratio("seconds"),
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=None)
    options = parser.parse_args()
    display.quiet_libraries()
    home = options.home or Path(tempfile.mkdtemp(prefix="thrifty-memory-"))
    home.mkdir(parents=True, exist_ok=True)
    results = options.results or home / "results.jsonl"
    names = options.only.split(",") if options.only else list(ways())
    done = {(r["name"], r["seed"]) for r in read(results)}
    for seed in range(options.seeds):
        for name in names:
            if (name, seed) in done:
                continue
            try:
                row = measured(options, home, name, seed)
            except ValueError as refusal:
                print(f"{name}: {str(refusal).partition(chr(10))[0]}", file=sys.stderr, flush=True)
                continue
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: dev {row['dev']:.3f}", file=sys.stderr, flush=True)
    print(heading(f"Memory techniques, {options.steps} steps of 8 x 256 tokens, stories260K"))
    columns = ("way", "seeds", "rate", "dev", "to adamw", "FLOPs", "off")
    columns += ("bytes predicted", "measured", "seconds predicted", "measured")
    print(display.table(columns, list(table(read(results))), right="lrrrrrrrrrr"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
