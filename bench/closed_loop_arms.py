"""The arms of ``closed_loop.py``: plan.yaml settings over common ones. A new arm is one entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from closed_loop_analysis import LOOP, SEQUENCE, UNIFORM

POOL_SHARE = 0.05
"""Of the pool's tokens, one pass over which is 1x."""
LENGTH = 256
INTERVALS = {1: 2, 3: 4, 10: 10}
"""Between the evaluations of a run that trains for its whole budget: the same clock for all arms of
a cell. Left to the planner they would hang on how busy the machine was."""

PLAIN_MEMORY = {
    "training.memory.trained": "full",
    "training.memory.weights": "float32",
    "training.memory.activations": "keep",
    "training.memory.loss": "whole",
    "training.memory.states": "adamw",
}
ROWS = "training.per_device_train_batch_size"
COMMON: dict[str, Any] = {
    "training.max_length": LENGTH,
    ROWS: 2,
    "training.gradient_accumulation_steps": 1,
}

GOVERNED = {
    "selection.refresh.when": "governed",
    "selection.refresh.scorer": "grad_cosine",
    "selection.refresh.times": 3,
    "selection.refresh.probe_rows": 128,
    # A tenth: pools are so small here that a fiftieth would not buy one look.
    "selection.refresh.probe_share": 0.1,
    "selection.refresh.shortlist": 0.05,
}
# The usual share. Candidates on 256 dev rows take 2x to 3x: the planner goes without.
PILOT = {"pilot.share": 0.1}
NO_PILOT = {"pilot.share": 0.0}
DEARER_PILOT = {"pilot.share": 0.3}
SWITCH = {"training.switch": "governed"}
CLOSED = {**PILOT, **GOVERNED, **SWITCH}
BY_CLOCK = {**CLOSED, "selection.refresh.when": "fixed", "selection.refresh.times": 2}
LORA = {"training.memory.trained": "lora"}
CLEAN = "clean on-target rows"
SMALLER = "{smaller}"
"""Stands for the folder of the smaller base model."""

ARMS: dict[str, dict[str, Any]] = {
    UNIFORM: {"selection.scorer": "uniform"},
    "dsir": {"selection.scorer": "dsir"},
    "embedding": {"selection.scorer": "embedding"},
    "less": {"selection.scorer": "less"},
    "less, smaller model": {
        "selection.scorer": {"less": {"model": SMALLER, "max_warmup_rows": 500, "epochs": 1}}
    },
    "cascade": {
        "selection.scorer": {
            "cascade": {
                "share_by_vectors": 0.08,
                "share_by_gradients": 0.03,
                "max_warmup_rows": 200,
                "epochs": 1,
            }
        }
    },
    "grad_cosine": {"selection.scorer": "grad_cosine"},
    LOOP: CLOSED,
    "fixed refresh": BY_CLOCK,
    "random refresh": {**BY_CLOCK, "selection.refresh.when": "random"},
    "loop less pilot": {**CLOSED, **NO_PILOT},
    "loop, dearer pilot": {**CLOSED, **DEARER_PILOT},
    "loop less refresh": {**PILOT, **SWITCH},
    "loop less memory action": {**PILOT, **GOVERNED},
    "loop less hysteresis": {
        **CLOSED,
        "selection.refresh.dwell": 1,
        "selection.refresh.momentum": 1.0,
        "selection.refresh.z": 0.0,
    },
    CLEAN: {"selection.scorer": "uniform"},
    "data alone": {"selection.scorer": "bm25", **LORA},
    "compute alone": {"selection.scorer": "uniform", **LORA},
    # bm25: what dsir counts would not fit beside the model where memory binds.
    SEQUENCE: {"selection.scorer": "bm25", "stopping": "plateau", **LORA},
}
FINALISTS = (UNIFORM, "dsir", "fixed refresh", "random refresh", LOOP)
WHERE_MEMORY_BINDS = ("data alone", "compute alone", SEQUENCE, "loop less memory action")
"""Arms for cells in which it does. There the planner holds a step as it sees fit, so that uniform
is memory alone; LoRA is the habit that the others stand for."""
ARMS_NOT_BUILT = {
    "loop with decoding": "the cell for it is not there",
}


class Run(NamedTuple):
    cell: str
    arm: str
    budget: int
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.cell}/{self.arm}/{self.budget}x/{self.seed}".replace(" ", "-")


def settings(run: Run, home: Path, tokens: float, *, binds: bool) -> dict[str, Any]:
    """plan.yaml keys of a run on a pool of so many tokens; where memory does not bind, all arms
    hold a step alike and are evaluated alike."""
    own = json.loads(json.dumps(ARMS[run.arm]).replace(SMALLER, str(home / "bases" / "smaller")))
    seeds = dict.fromkeys(("selection.seed", "training.seed", "selection.refresh.seed"), run.seed)
    if binds:  # the planner holds a step as it sees fit, of the same sequences
        return {"training.max_length": LENGTH, **own, **seeds}
    steps = run.budget * POOL_SHARE * tokens / (LENGTH * COMMON[ROWS])
    common = {
        **COMMON,
        **PLAIN_MEMORY,
        "training.eval_steps": max(1, round(steps / INTERVALS[run.budget])),
    }
    return {**common, **own, **seeds}
