"""Run folders with small invented numbers, written through the same API that a real run uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thrifty.core import plan as plans
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import Ledger, Rates, Stage
from thrifty.core.marginal import Estimate, Option, choose
from thrifty.core.plan import ModelSource, Plan, PoolSource, Selection, Target, Training
from thrifty.run_folder import RunFolder
from thrifty.scaling.curves import Forecast

BUDGET = Budget(flops=1e13, seconds=600.0, memory_bytes=2.0 * 2**30)
UNIT = "nats/token"


def cost(flops: float, seconds: float, tokens: float = 0.0, peak: float = 0.0) -> Cost:
    return Cost(flops=flops, seconds=seconds, tokens=tokens, peak_memory_bytes=peak)


PREDICTED = {
    "select": cost(1e12, 40.0, peak=4e8),
    "train": cost(8e12, 400.0, 6e5, 9e8),
    "test": cost(2e11, 8.0, peak=4e8),
}


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "model": ModelSource(path="models/small"),
        "pool": PoolSource(sources=("pool.jsonl",)),
        "targets": {"asyncio": Target(signal=("signal.jsonl",))},
        "budget": BUDGET,
        "selection": Selection(scorer="bm25", max_tokens=2e5),
        "training": Training(
            max_steps=100,
            cooldown_steps=20,
            eval_steps=20,
            save_steps=20,
            per_device_train_batch_size=8,
            max_length=512,
        ),
        "predicted": {name: c.to_dict() for name, c in PREDICTED.items()},
        "why": {
            "selection.scorer": "bm25: the best prior gain per FLOP",
            "training.max_length": "512: holds the longest example",
        },
    }
    return Plan(**{**values, **changes})


def start(path: Path, plan: Plan, rates: Rates | None = None) -> tuple[RunFolder, Ledger]:
    """A planned run: plan.yaml and a ledger with the planner's decisions."""
    run = RunFolder(path)
    path.mkdir()
    run.plan_file.write_text(plans.dump(plan), encoding="utf-8")
    ledger = Ledger.create(run.ledger_file, plan.budget, rates)
    options = [
        Option("uniform", Estimate(0.30, 0.0, UNIT, "prior"), cost(8e12, 400.0), "flops"),
        Option("bm25", Estimate(0.42, 0.05, UNIT, "prior"), cost(9.0e12, 430.0), "flops"),
        Option("grad_cosine", Estimate(0.44, 0.2, UNIT, "prior"), cost(9.8e12, 500.0), "flops"),
    ]
    choice = choose(options, resource="flops")
    ledger.decide("scorer and technique", choice.chosen, choice.reason, choice=choice)
    for key, why in plan.why.items():
        ledger.decide(key, None, why)
    return run, ledger


def spend(stage: Stage, activity: str, used: Cost, *, step: int = 0, lost: bool = False) -> None:
    """One charge as ``used`` says; the lease's clock is set back, for it takes no seconds."""
    lease = stage.lease(activity, used, step=step)
    lease._start -= used.seconds
    lease.tick(used, steps=20 if activity == "train" else 0)
    lease.settle(lost=lost)


def select(run: RunFolder, ledger: Ledger) -> None:
    with ledger.stage("select", "bm25", predicted=PREDICTED["select"]) as stage:
        spend(stage, "prepare", cost(2e11, 12.0, peak=3e8))
        spend(stage, "score", cost(9e11, 33.0, peak=4.1e8))
    write_selected(run)


def train(
    ledger: Ledger,
    *,
    losses: tuple[float, ...] = (2.51, 2.30, 2.21, 2.16, 2.13, 2.05),
    account: str = "budget",
    end: bool = True,
) -> None:
    """A run of 20 steps an evaluation; with a forecast at each from the second on."""
    name = "train" if account == "budget" else f"{account}-train"
    predicted = PREDICTED["train"] if account == "budget" else None
    with ledger.stage(name, "full", predicted=predicted, account=account) as stage:
        for i, loss in enumerate(losses):
            step = 20 * i
            if i:
                spend(stage, "train", cost(1.5e12, 74.0, 81920, 8.8e8), step=step - 20)
            spend(stage, "evaluate", cost(4e10, 2.0, peak=5e8), step=step)
            flops = stage.spent().flops
            stage.evaluate(step, flops, loss, 0.03 if i == 0 else 0.006, {"asyncio": loss})
            if 1 < i < min(4, len(losses) - 1):
                seen = Forecast(
                    flops + 1.54e12,
                    losses[i + 1] + 0.01,
                    0.012,
                    0.04,
                    0.01,
                    final=losses[i + 1] - 0.03,
                    final_stderr=0.02,
                    final_flops=flops + 1.54e12,
                    wrong=0.973,
                )
                option = Option(
                    "train on",
                    Estimate(seen.gain, seen.gain_stderr, UNIT, "history"),
                    cost(1.54e12, 76.0, 81920),
                )
                choice = choose([option], resource="flops", incumbent="train on", z=1.645)
                stage.decide(
                    "train on or stop",
                    "train on",
                    f"next interval gains 0.04; {choice.reason}",
                    choice=choice,
                    detail={"forecast": seen.__dict__},
                    step=step,
                )
        if end:
            stage.detail.update(steps=100, best_step=20 * (len(losses) - 1))
        else:
            raise KeyboardInterrupt("signal 2")


def test(ledger: Ledger) -> None:
    with ledger.stage("test", "test", predicted=PREDICTED["test"]) as stage:
        spend(stage, "test", cost(2e11, 8.5, peak=4e8))
        stage.detail = {
            "rows": "test",
            "before": 2.49,
            "after": 2.06,
            "change_stderr": 0.011,
            "by_target": {"asyncio": 2.06},
            "by_target_before": {"asyncio": 2.49},
        }


def control(ledger: Ledger, difference: float = 0.05, stderr: float = 0.01) -> None:
    with ledger.stage("control-select", "uniform", account="control") as stage:
        spend(stage, "pick", cost(0.0, 0.4))
    train(ledger, losses=(2.51, 2.34, 2.26, 2.21, 2.18, 2.11), account="control")
    with ledger.stage("control-test", "test", account="control") as stage:
        spend(stage, "test", cost(1e11, 4.0))
        stage.detail = {
            "rows": "test",
            "after": 2.06 + difference,
            "by_target": {"asyncio": 2.06 + difference},
            "difference": difference,
            "difference_stderr": stderr,
        }


def finished(
    path: Path, *, with_control: bool = True, price: bool = True, **more: Any
) -> RunFolder:
    rates = Rates(dollars_per_second=2.5 / 3600, watts=65.0) if price else None
    run, ledger = start(path, plan(control=with_control), rates)
    with ledger:
        select(run, ledger)
        train(ledger)
        test(ledger)
        if with_control:
            control(ledger, **more)
    return run


def write_selected(run: RunFolder, **changes: Any) -> None:
    folder = run.selected("budget")
    folder.mkdir(parents=True, exist_ok=True)
    run.pool.mkdir(exist_ok=True)
    edges = [i / 10 for i in range(41)]
    everyone = [int(400 * 2.7 ** (-(((e - 1.4) / 0.6) ** 2))) for e in edges[:-1]]
    files: dict[str, Any] = {
        "manifest.json": {
            "settings": "0" * 64,
            "scorer": "bm25",
            "picker": "top_k",
            "num_candidates": 5120,
            "num_selected": 640,
            "num_tokens": 199_840,
            "dropped": {"duplicate": 41, "in dev rows of asyncio": 3},
            "in_targets": {"asyncio": 2},
        },
        "histogram.json": {
            "asyncio": {
                "edges": edges,
                "all": everyone,
                "selected": [n if e > 2.0 else 0 for n, e in zip(everyone, edges, strict=False)],
            }
        },
        "examples.json": {
            "selected": [example(i, 3.9 - i / 20) for i in range(20)],
            "rejected": [
                {
                    **example(i, None if i < 5 else 1.9 - i / 12),
                    "reason": "duplicate of row 17" if i < 5 else "outside the token budget",
                }
                for i in range(20)
            ],
        },
    }
    for name, value in {**files, **changes}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name).write_text(text, encoding="utf-8")
    manifest = {"num_examples": 5120, "num_bad": {"bad_json": 3, "empty": 12, "nul": 1}}
    (run.pool / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def example(row: int, score: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "id": row,
        "file": "pool.jsonl",
        "number": row + 1,
        "score": score,
        "tokens": 120 + row,
        "text_prompt": f"Write the docstring of function number {row}.",
        "text_completion": 'def wait(self, timeout=0):\n    """Wait until it is set."""\n'
        "    return self._event.wait(timeout)\n",
        **changes,
    }
