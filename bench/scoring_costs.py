"""What choosing rows was predicted to take, against what it took: every scorer, and the pickers
that look at rows themselves.

    OMP_NUM_THREADS=1 python bench/scoring_costs.py [SHARED/data] [--rows 5000] [--only ifd,less]

Model: stories260K on the first rows of the mixed pool, with two targets; without a folder a small
model on functions of the standard library. The machine is measured first, as `thrifty device` does,
in the same process, then every way is planned and selected with, in turn, twice. Nothing is taken
over from an earlier run. FLOPs are what a budget is kept by; seconds are of the whole stage:
loading, preparing, scoring, picking, writing. Beside the clock's stand the processor's seconds of
this process, by which a prediction is judged: of a machine that others use too they say more. Of
two runs the faster counts; where their clocks differ by more than 10%, the row says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from material import heading, small_job
from mix import TARGETS, write_targets
from thrifty import display, stages
from thrifty.core.budget import Budget, Cost
from thrifty.core.plan import Target
from thrifty.core.resolve import all_names
from thrifty.preparation import Asked, plan_run
from thrifty.run_folder import RunFolder

MOST_OFF = {"FLOPs": 0.10, "seconds": 0.30}
"""By how much a prediction may be off."""
LOOKING = {
    "clusters (vectors)": {"selection.picker": "clusters"},
    "facility_location (vectors)": {"selection.picker": "facility_location"},
    "facility_location (delift)": {
        "selection.picker": {"facility_location": {"over": "delift", "max_rows": 24}}
    },
}
"""Pickers, after a scorer that takes nothing."""


def job(data: Path | None, home: Path, rows: int) -> dict[str, Any]:
    """The fields of ``Asked`` that name model, pool and targets."""
    if data is None:
        return small_job(home, rows=rows)
    pool = home / "pool.parquet"
    table = pq.read_table(data / "mix" / "pool.parquet", columns=["prompt", "response"])
    pq.write_table(table.slice(0, rows), pool)
    write_targets(data, home)
    parts = {t: {p: (str(home / f"{t}-{p}.parquet"),) for p in ("dev", "test")} for t in TARGETS}
    targets = {t: Target(signal=part["dev"], dev=part["test"]) for t, part in parts.items()}
    return {"model": str(data / "stories260K-hf"), "pool": (str(pool),), "targets": targets}


def selected(asked: dict[str, Any], home: Path, way: dict[str, Any]) -> tuple[Cost, Cost, float]:
    """Predicted and measured, of one selection, and the processor's seconds."""
    folder = home / "run"
    shutil.rmtree(folder, ignore_errors=True)
    fixed = {
        "selection.max_tokens": 50_000.0,
        "training.memory.trained": "full",
        "training.memory.weights": "float32",
        "training.max_length": 512,
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 10,
        **way,
    }
    plan = plan_run(Asked(**asked, budget=Budget(flops=1e16), fixed=fixed), folder, quiet)[2]
    with stages.at_work(RunFolder(folder), quiet) as work:
        start = time.process_time()
        stages.select(work, work.main)
        used = time.process_time() - start
        spent = work.ledger.spent(stage="select")
    return Cost.from_dict(plan.predicted["select"]), spent, used


def row(name: str, runs: list[tuple[Cost, Cost, float]]) -> tuple[str, ...]:
    predicted = runs[0][0]
    flops = max(measured.flops for _, measured, _ in runs)
    clock = [measured.seconds for _, measured, _ in runs]
    used = min(seconds for *_, seconds in runs)
    off = _off(predicted.flops, flops), _off(predicted.seconds, used)
    missed = [
        what for (what, most), by in zip(MOST_OFF.items(), off, strict=True) if abs(by) > most
    ]
    busy = ", machine busy" if max(clock) > 1.1 * min(clock) else ""
    return (
        name,
        f"{predicted.flops:.3g}",
        f"{flops:.3g}",
        f"{off[0]:+.1%}",
        f"{predicted.seconds:.2f}",
        f"{used:.2f}",
        f"{min(clock):.2f}",
        f"{off[1]:+.0%}",
        ", ".join(missed) + busy,
    )


def _off(predicted: float, measured: float) -> float:
    return predicted / measured - 1 if measured else float(predicted > 0)


def quiet(line: str) -> None:
    pass


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    ways = {name: {"selection.scorer": name} for name in all_names("scorer")}
    ways |= {name: {"selection.scorer": "uniform", **more} for name, more in LOOKING.items()}
    only = set(filter(None, options.only.split(",")))
    ways = {name: way for name, way in ways.items() if not only or name in only}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["THRIFTY_CACHE"] = str(home / "cache")
        os.environ["THRIFTY_ROWS_CACHE_GIB"] = "0"  # every scoring is paid for
        asked = job(options.data, home, options.rows)
        from thrifty.calibration import measure_device

        device = measure_device()
        selected(asked, home, {"selection.scorer": "loss"})  # what is loaded once is loaded now
        runs: dict[str, list[tuple[Cost, Cost, float]]] = {name: [] for name in ways}
        for _ in range(2):
            for name, way in ways.items():
                runs[name].append(selected(asked, home, way))
                print(*row(name, runs[name]), sep="  ", file=sys.stderr, flush=True)
    print(heading(f"Choosing from {options.rows:,} rows, predicted against measured"))
    if device.machine_busy:
        print("the machine was busy while it was measured")
    headers = ("way", "FLOPs predicted", "measured", "off")
    headers += ("s predicted", "CPU s", "clock's", "off", "")
    print(display.table(headers, [row(*each) for each in runs.items()], right="lrrrrrrrl"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
