"""A run of ``closed_loop.py``, in its own process: planned or gone on with, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from closed_loop_arms import CLEAN, Run, settings
from closed_loop_cells import PARTS


def asked(
    home: Path, cell: str, facts: Mapping[str, Any], fixed: dict[str, Any], budget: Any, pool="pool"
) -> Any:
    from thrifty.core.plan import Target
    from thrifty.preparation import Asked

    folder = home / "cells" / cell

    def part(target: str, name: str) -> tuple[str, ...]:
        return (str(folder / f"{target}-{name}.parquet"),)

    targets = {t: Target(**{name: part(t, name) for name in PARTS}) for t in facts["targets"]}
    return Asked(
        model=str(home / "bases" / facts["base"]),
        pool=(str(folder / f"{pool}.parquet"),),
        targets=targets,
        budget=budget,
        fixed=fixed,
    )


def one(home: Path, run: Run) -> None:
    """Plan, or go on with, a run; leave result.json and drop what takes space. What planning leaves
    in memory is not the run's, so that it runs in a process that has not planned."""
    from thrifty import display, pipeline
    from thrifty.core.budget import Budget
    from thrifty.planner import NoPlanFits
    from thrifty.preparation import plan_run

    display.quiet_libraries()
    folder = home / "runs" / run.folder
    facts = json.loads((home / "cells" / run.cell / "cell.json").read_text())
    limit = run.budget * facts["unit_flops"]
    total = Budget(flops=limit + facts["test_flops"], memory_bytes=facts["memory_bytes"])
    if not (folder / "plan.yaml").is_file():
        fixed = settings(run, home, facts["tokens"], binds=facts["memory_bytes"] is not None)
        pool = "clean" if run.arm == CLEAN else "pool"
        wanted = asked(home, run.cell, facts, fixed, total, pool)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            plan_run(wanted, folder, quiet)
        except NoPlanFits as refusal:
            folder.mkdir(parents=True, exist_ok=True)
            line = str(refusal).partition("\n")[0]
            (folder / "result.json").write_text(json.dumps({**run._asdict(), "refused": line}))
            return
        os.execv(sys.executable, [sys.executable, *sys.argv])
    pipeline.run(folder, quiet)
    found = {**run._asdict(), **measured(folder, facts["targets"]), "limit": limit}
    found["flops"] -= found.pop("test_flops")
    (folder / "result.json").write_text(json.dumps(found))
    for name in ("pool", "targets", "checkpoints", "model", "scores", "online", "refreshes"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for each in (folder / "pilot").glob("*/"):
        shutil.rmtree(each, ignore_errors=True)


def measured(folder: Path, targets: Sequence[str]) -> dict[str, Any]:
    """What a finished run's ledger and test say."""
    from thrifty.core.resolve import parse_spec
    from thrifty.refresh import CHOSEN_ANEW, DECISION
    from thrifty.run_folder import RunFolder

    place = RunFolder(folder)
    plan = place.plan()
    with place.reading() as book:
        spent, decisions = book.spent(), book.decisions()
        losses = [each["objective"] for each in book.evaluations() if each["stage"] == "train"]
        activities: dict[str, float] = {}
        for charge in book.charges():
            key = f"{charge['stage']}: {charge['activity']}"
            activities[key] = activities.get(key, 0.0) + charge["flops"]
        by_stage = {name: book.spent(stage=name) for name in ("pilot", "select", "train", "test")}
    weighed = [d for d in decisions if d["name"] == DECISION]
    chosen = [d for d in decisions if d["name"] == CHOSEN_ANEW]
    anew = [d for d in chosen if "drift" in d["detail"]]  # the others by the old scores
    looks = {d["step"]: d["detail"]["standing"]["drift"]["mean"] for d in weighed}
    looks |= {d["step"]: d["detail"]["drift"]["mean"] for d in anew}
    with np.load(folder / "test_losses.npz", allow_pickle=False) as arrays:
        names = sorted(targets)
        nll = {t: arrays[f"nll_{i}"].tolist() for i, t in enumerate(names)}
        tokens = {t: arrays[f"tokens_{i}"].tolist() for i, t in enumerate(names)}
    return {
        "dev": min(losses),
        "nll": nll,
        "tokens": tokens,
        "flops": spent.flops,
        "test_flops": by_stage["test"].flops,
        "pilot_flops": by_stage["pilot"].flops,
        "refreshes": len(anew),
        "drifts": [looks[step] for step in sorted(looks)],
        "detail": {
            "before": losses[0],
            "scorer": parse_spec("scorer", plan.selection.scorer)[0],
            "pilot": plan.pilot.share,
            "memory": {k: str(v) for k, v in vars(plan.training.memory).items()},
            "steps": plan.training.max_steps,
            "epochs": plan.training.epochs,
            "evaluations": len(losses),
            "activities": activities,
            "seconds": spent.seconds,
            "weighed": len(weighed),
            "widths": [d["detail"]["width"] for d in chosen if "width" in d["detail"]],
            "refresh_steps": [d["step"] for d in anew],
            "kept_at_refresh": [d["detail"]["kept"] for d in anew],
        },
    }


def quiet(line: str) -> None:
    """Says nothing."""
