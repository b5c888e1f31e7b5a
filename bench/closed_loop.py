"""The closed loop against what it must beat, every FLOP charged: the claim, built so that it can
fail.

    python bench/closed_loop.py DATA --home HOME [--smoke] [--workers 2] [--hours 8]
                                [--only math,both] [--arms "uniform,the loop"] [--seeds 2]
                                [--budgets 1,3] [--table]

A run is a cell (``closed_loop_cells.py``), an arm, a budget and a seed, in a folder of its own and
a process of one thread; what was interrupted goes on when the command is given again. 1x is the
FLOPs of one pass over 5% of the pool's tokens; a run has so many times that for everything it does,
and the test of the base and of its model besides, which the bench asks for. What is claimed, by
which numbers it falls, and what was found: docs/closed_loop.md.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import closed_loop_analysis as analysis
from closed_loop_analysis import LOOP, SEQUENCE, UNIFORM, Result, Results
from closed_loop_arms import (
    ARMS,
    ARMS_NOT_BUILT,
    CLEAN,
    COMMON,
    FINALISTS,
    LENGTH,
    PLAIN_MEMORY,
    POOL_SHARE,
    WHERE_MEMORY_BINDS,
    Run,
)
from closed_loop_cells import CELLS, NOT_BUILT, Cell, Rows, draw, passages, write
from closed_loop_run import asked, one, quiet
from material import heading

SEEDS, ABLATION_SEEDS = 5, 2

# -- the form -------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of a base model and its pretraining."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    steps: int


BASES = {
    "small": Size(128, 3, 2048, 1000),
    "large": Size(256, 5, 2048, 500),
    "smaller": Size(64, 2, 2048, 1000),
}
SMOKE_BASES = {
    "small": Size(64, 2, 1024, 200),
    "large": Size(256, 5, 1024, 20),
    "smaller": Size(64, 1, 1024, 100),
}
SMOKE_CELLS = ("math", "scarce math", "both")
SMOKE_ARMS = (UNIFORM, "dsir", LOOP, "fixed refresh", "random refresh", SEQUENCE)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    wanted = options.only or (SMOKE_CELLS if options.smoke else [cell.name for cell in CELLS])
    found = [cell for cell in CELLS if cell.name in wanted]
    if len(found) < len(set(wanted)):
        raise SystemExit(
            f"no such cell among {', '.join(wanted)}; there are {[c.name for c in CELLS]}"
        )
    if options.smoke:
        found = [
            replace(
                cell,
                pool_rows=3000,
                held_rows=64,
                scarce=cell.scarce and cell.scarce // 5,
                budgets=(10,) if cell.memory_share is None else (1,),
            )
            for cell in found
        ]
    return found


def runs_of(options: argparse.Namespace, cells: Sequence[Cell]) -> Iterator[Run]:
    """The first seed of every cell before the second of any."""
    for seed in range(options.seeds or (1 if options.smoke else SEEDS)):
        for cell in cells:
            for budget in cell.budgets:
                if options.budgets and budget not in options.budgets:
                    continue
                for arm in arms_of(options, cell):
                    if options.smoke or seed < num_seeds(arm, budget, cell.budgets):
                        yield Run(cell.name, arm, budget, seed)


def num_seeds(arm: str, budget: int, budgets: Sequence[int]) -> int:
    """Forms of the loop that differ in what happens on the way are run where there is a way."""
    if arm in (*FINALISTS, SEQUENCE):
        return SEEDS
    too_short = budget == 1 and "loop" in arm and len(budgets) > 1
    return 0 if too_short or (budget == 10 and arm == CLEAN) else ABLATION_SEEDS


def arms_of(options: argparse.Namespace, cell: Cell) -> list[str]:
    wanted = options.arms or (SMOKE_ARMS if options.smoke else ARMS)
    if unknown := set(wanted) - set(ARMS):
        raise SystemExit(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    out = WHERE_MEMORY_BINDS if cell.memory_share is None else ()
    return [arm for arm in wanted if arm not in out]


# -- what runs stand on ---------------------------------------------------------------------------


def base_of(name: str, data: Path, home: Path, smoke: bool) -> Path:
    """A model pretrained on running text, made once."""
    from thrifty.pretrain import pretrain

    size = (SMOKE_BASES if smoke else BASES)[name]
    folder = home / "bases" / name
    print(f"base model {name}", file=sys.stderr, flush=True)
    pretrain(
        passages(data, 400 if smoke else 8000),
        folder,
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        sequence_length=LENGTH,
        batch_size=8,
        steps=size.steps,
        show_progress=False,
    )
    return folder


def prepare(cell: Cell, options: argparse.Namespace) -> Rows:
    """The cell's files, and what 1x of it is; returns its rows, whose hidden columns stay here."""
    home, folder = options.home, options.home / "cells" / cell.name
    rows = draw(cell, options.data)
    form = {"pool_rows": len(rows.pool), "base": cell.base, "targets": list(cell.targets)}
    if (folder / "cell.json").is_file():
        made = json.loads((folder / "cell.json").read_text())
        if any(made.get(key) != value for key, value in form.items()):
            raise SystemExit(f"{folder} holds another form of this cell: give another --home")
        return rows
    shutil.rmtree(folder, ignore_errors=True)
    write(rows, folder)
    for name in {cell.base, "smaller"}:
        base_of(name, options.data, home, options.smoke)
    facts = {**form, **_amounts(cell, home)}
    (folder / "cell.json").write_text(json.dumps(facts, indent=2))
    return rows


def _amounts(cell: Cell, home: Path) -> dict[str, float | None]:
    """By a plan of AdamW on all weights that nothing limits: 1x, the test, the memory limit."""
    from thrifty.core.budget import Budget
    from thrifty.costs.flops import train_flops
    from thrifty.costs.memory import RUNTIME_BYTES
    from thrifty.costs.shape import read_shape
    from thrifty.preparation import plan_run

    draft = home / "cells" / cell.name / "draft"
    os.environ["THRIFTY_CACHE"] = str(home / "cache-plans")
    facts = {"base": cell.base, "targets": cell.targets}
    fixed = {**COMMON, **PLAIN_MEMORY, "selection.scorer": "uniform", "training.max_steps": 100}
    plan = plan_run(asked(home, cell.name, facts, fixed, Budget(flops=1e18)), draft, quiet)[2]
    tokens = json.loads((draft / "pool" / "manifest.json").read_text())["num_tokens"]
    shape = read_shape(home / "bases" / cell.base)
    idle = RUNTIME_BYTES["cpu"]  # what a process holds before it holds a model
    peak = (plan.predicted["train"]["peak_memory_bytes"] or 0.0) - idle
    shutil.rmtree(draft)
    return {
        "tokens": tokens,
        "unit_flops": POOL_SHARE * tokens * train_flops(shape, 1, LENGTH) / LENGTH,
        "test_flops": plan.predicted["test"]["flops"],
        "memory_bytes": cell.memory_share and idle + cell.memory_share * peak,
    }


# -- all of them ----------------------------------------------------------------------------------


def carry_out(options: argparse.Namespace, runs: Sequence[Run], hidden: Mapping[str, Rows]) -> None:
    """So many at a time as there are workers, until all are done or the hours are over."""
    until = time.monotonic() + 3600 * options.hours
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(options.workers):
        slots.put(slot)

    def work(run: Run) -> None:
        folder = options.home / "runs" / run.folder
        if (folder / "result.json").is_file() or time.monotonic() > until:
            return
        slot = slots.get()
        try:
            cache = options.home / f"cache-{slot}"
            shutil.rmtree(cache / "scores", ignore_errors=True)  # every choice is paid for
            start = time.monotonic()
            command = [sys.executable, __file__, str(options.data), "--home", str(options.home)]
            command += ["--one", json.dumps(run)]
            threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment = {**os.environ, **threads, "THRIFTY_CACHE": str(cache)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            _note(run, folder, hidden[run.cell], done, time.monotonic() - start)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work, runs))


def _note(
    run: Run, folder: Path, rows: Rows, done: subprocess.CompletedProcess[str], seconds: float
) -> None:
    file = folder / "result.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.txt").write_text(done.stderr[-20000:])
        print(f"{run.folder}: FAILED, see failure.txt", file=sys.stderr, flush=True)
        return
    found = json.loads(file.read_text())
    if "refused" not in found:
        found["detail"]["wall_seconds"] = seconds
        if run.arm != CLEAN:
            ids = np.load(folder / "selected" / "ids.npy", allow_pickle=False)
            found["detail"]["on_target"] = float(rows.on_target[ids].mean())
        file.write_text(json.dumps(found))
    told = found.get("refused") or f"dev {found['dev']:.3f}, {found['refreshes']} refreshes"
    print(f"{run.folder}: {told}, {seconds:.0f} s", file=sys.stderr, flush=True)


def read(home: Path, runs: Sequence[Run]) -> tuple[Results, dict[tuple[str, int, str], str]]:
    """What is done of ``runs``, and what their budgets do not pay for."""
    results, refused = [], {}
    for run in runs:
        file = home / "runs" / run.folder / "result.json"
        failure = file.with_name("failure.txt")
        if not file.is_file():
            if failure.is_file():
                why = failure.read_text().strip().splitlines()
                refused[run.cell, run.budget, run.arm] = f"failed: {_last_error(why)}"
            continue
        found = json.loads(file.read_text())
        if "refused" in found:
            refused[run.cell, run.budget, run.arm] = "not to be paid for"
        else:
            results.append(Result(**found))
    return Results(results), refused


def _last_error(lines: Sequence[str]) -> str:
    """Of a traceback what was raised."""
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exceeded|Exception|Fits)\b", line)]
    return (named or lines or ["?"])[-1][:100]


def tell(options: argparse.Namespace, cells: Sequence[Cell], runs: Sequence[Run]) -> None:
    from thrifty import display

    results, refused = read(options.home, runs)
    form = "smoke form: " if options.smoke else ""
    print(heading(f"{form}The closed loop, {len(results.runs)} of {len(runs)} runs"))
    print(display.table(analysis.HEADERS, analysis.table(results, refused), right=analysis.RIGHT))
    for name, why in [*ARMS_NOT_BUILT.items(), *NOT_BUILT.items()]:
        print(f"not built: {name}: {why}")
    for cell in cells:
        drift = results.drift(cell.name)
        if drift is not None:
            meant = "meant to drift" if cell.drifts else "not meant to drift"
            print(f"{cell.name}: {meant}; re-scored half-way, rank correlation {1 - drift:.2f}")
    drifting = [cell.name for cell in cells if cell.drifts]
    both = [c.name for c in cells if c.memory_share is not None and 1 in c.budgets]
    print(
        f"dynamic (beats both refresh controls where scores drift): "
        f"{analysis.dynamic(results, drifting)}"
    )
    print(
        f"coupled (beats the three in sequence where memory and FLOPs bind): "
        f"{analysis.coupled(results, both)}"
    )
    print(f"safe (above uniform nowhere by more than the pilot's cost): {analysis.safe(results)}")
    print(
        f"near the hindsight-best static choice (median regret at most 10%): "
        f"{analysis.near_best(results)}"
    )


def main() -> int:
    def listed(text: str) -> list[str]:
        return [part.strip() for part in text.split(";" if ";" in text else ",")]

    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="three small cells, one seed")
    parser.add_argument("--only", type=listed, help="cells")
    parser.add_argument("--arms", type=listed, help="with semicolons where a name has a comma")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--budgets", type=lambda text: [int(b) for b in listed(text)])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hours", type=float, default=1e6, help="then no run is begun")
    parser.add_argument("--table", action="store_true", help="of what is done, and begin nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.home = options.home.absolute()
    if options.one:
        one(options.home, Run(*json.loads(options.one)))
        return 0
    cells = cells_of(options)
    runs = list(runs_of(options, cells))
    if not options.table:
        hidden = {cell.name: prepare(cell, options) for cell in cells}
        carry_out(options, runs, hidden)
    tell(options, cells, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
