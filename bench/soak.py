"""Kill `thrifty run` at random instants with SIGKILL and run the same command again, until it is
done; then compare with a run that nobody touched.

    python bench/soak.py [--kills 10] [--seed 0] [--folder DIR]

All but kills and resumes must be 0: torn (a resume that failed), unequal (final weights or
evaluations that differ), lost (spending that the ledger forgot), overspent.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from material import heading, small_job
from thrifty import display, preparation
from thrifty.core.budget import Budget
from thrifty.preparation import Asked
from thrifty.run_folder import RunFolder

FIXED = {
    "training.max_length": 128,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.memory.trained": "full",
    "selection.scorer": "bm25",
    "training.max_steps": 150,
}


def plan(folder: Path, job: dict) -> None:
    # Headroom: no limit binds, so that the weights must come out the same.
    asked = Asked(**job, budget=Budget(flops=1e13), fixed=FIXED)
    preparation.plan_run(asked, folder, lambda line: None)


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "thrifty", "run", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    home = options.folder or Path(tempfile.mkdtemp(prefix="thrifty-soak-"))
    job = small_job(home)
    straight, broken = home / "straight", home / "broken"
    for folder in (straight, broken):
        shutil.rmtree(folder, ignore_errors=True)
        plan(folder, job)
    began = time.monotonic()
    if start(straight).wait():
        print("the run that nobody touched failed", file=sys.stderr)
        return 1
    whole = time.monotonic() - began
    rng = random.Random(options.seed)
    kills = resumes = torn = 0
    killed_flops = 0.0
    while True:
        process = start(broken)
        resumes += 1
        delay = rng.uniform(0.3, 1.1) * whole if kills < options.kills else None
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if process.returncode != 0:
            torn += 1
            print(process.stderr.read().decode()[-2000:], file=sys.stderr)  # type: ignore[union-attr]
            break
        if kills >= options.kills:
            break
        # Done before its kill: begin again, so that every kill hits a run at work.
        shutil.rmtree(broken)
        plan(broken, job)
    with RunFolder(straight).reading() as one, RunFolder(broken).reading() as other:
        useful, wasted = other.spent(lost=False), other.spent(lost=True)
        killed_flops = wasted.flops
        same_flops = abs(useful.flops - one.spent().flops) <= 1e-9 * useful.flops
        keys = ("step", "objective", "stderr")
        same_path = [[e[k] for k in keys] for e in one.evaluations()] == [
            [e[k] for k in keys] for e in other.evaluations()
        ]
        overspent = int(any(amount < 0 for amount in other.left().values()))
    files = [folder / "model" / "model.safetensors" for folder in (straight, broken)]
    same = all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()
    counts = {
        "kills": kills,
        "resumes": resumes,
        "torn": torn,
        "unequal": int(not (same and same_path)),
        "lost": int(not same_flops),
        "overspent": overspent,
    }
    print(heading("Soak: SIGKILL at random instants"))
    print(display.table(list(counts), [[str(v) for v in counts.values()]], right="r" * len(counts)))
    print(f"work lost to kills and charged as lost: {killed_flops:.3g} FLOPs; run: {whole:.0f} s")
    bad = sum(counts[name] for name in ("torn", "unequal", "lost", "overspent"))
    if not options.folder:
        shutil.rmtree(home, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
