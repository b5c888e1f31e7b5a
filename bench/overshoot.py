"""Budget overshoot over random budgets of FLOPs, seconds and tokens: how many steps over a limit.

    python bench/overshoot.py [--budgets 50]

Each budget is planned, selected for by a random scorer, trained and tested for real on a small
model. Over a limit = spent more than it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from pathlib import Path

from material import heading, small_job
from thrifty import display, preparation, stages
from thrifty.core.budget import Budget
from thrifty.data.store_cache import VARIABLE
from thrifty.planner import NoPlanFits
from thrifty.preparation import Asked
from thrifty.run_folder import RunFolder

SCORERS = ("uniform", "bm25", "perplexity", "grad_cosine")


def quiet(line: str) -> None:
    """Says nothing."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", type=int, default=50)
    options = parser.parse_args()
    os.environ[VARIABLE] = "0"  # scores of one run would be free for the next
    home = Path(tempfile.mkdtemp(prefix="thrifty-overshoot-"))
    job = small_job(home, rows=600)
    fixed = {
        "training.max_length": 128,
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.epochs": 100,  # or the pool would end runs that time should end
    }
    rng = random.Random(0)
    over, shares, refused = {}, {}, 0
    number = 0
    while number < options.budgets:
        limits = {
            "flops": 10 ** rng.uniform(10.3, 11.2),
            "tokens": 10 ** rng.uniform(3.7, 4.7),
            "seconds": rng.uniform(4, 12),
        }
        chosen = rng.sample(sorted(limits), rng.randint(1, 3))
        scorer = rng.choice(SCORERS)
        budget = Budget(**{name: limits[name] for name in chosen})
        folder = home / "run"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            preparation.plan_run(
                Asked(**job, budget=budget, fixed=fixed | {"selection.scorer": scorer}),
                folder,
                quiet,
            )
        except NoPlanFits:
            refused += 1
            continue
        with stages.at_work(RunFolder(folder), quiet) as work:
            stages.select(work, work.main)
            stages.train(work, work.main)
            stages.test(work, work.main)
            spent = work.ledger.spent()
        used = {name: spent.of(name) / budget.limit(name) for name in chosen}
        binding = max(used, key=used.get)
        for name in chosen:
            over.setdefault(name, 0)
            over[name] += used[name] > 1
        shares.setdefault(binding, []).append(used[binding])
        number += 1
        print(f"{number:>3}  {budget}, {scorer}: {used[binding]:.1%} of {binding}", flush=True)
    print(
        heading(f"Overshoot over {options.budgets} random budgets ({refused} refused as too small)")
    )
    rows = [
        (
            name,
            str(over[name]),
            f"{len(shares.get(name, []))}",
            f"{sum(shares.get(name, [0])) / max(len(shares.get(name, [])), 1):.1%}",
        )
        for name in sorted(over)
    ]
    print(
        display.table(
            ("limit", "runs over it", "runs it bound", "mean share used"), rows, right="lrrr"
        )
    )
    shutil.rmtree(home)
    return sum(over.values())


if __name__ == "__main__":
    raise SystemExit(main())
