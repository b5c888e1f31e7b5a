"""Small real runs for the tests: planned through the API, on the tiny model and data."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from thrifty import stages
from thrifty.core.budget import Budget
from thrifty.core.ledger import Ledger
from thrifty.core.plan import Plan, Target
from thrifty.preparation import Asked, plan_run
from thrifty.run_folder import RunFolder

SMALL = {
    "training.max_length": 64,
    "training.per_device_train_batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.memory.trained": "full",
    "training.memory.weights": "float32",
    "training.learning_rate": 3e-3,
    "selection.scorer": "bm25",
    "training.eval_steps": 10,
    "training.save_steps": 10,
}


def silent(line: str) -> None:
    """Says nothing."""


def asked(model: Path, data: dict[str, Path], **changes: Any) -> Asked:
    fixed = {**SMALL, **changes.pop("fixed", {})}
    settings: dict[str, Any] = {
        "model": str(model),
        "pool": (str(data["pool"]),),
        "targets": {
            "sums": Target(
                signal=(str(data["signal"]),), dev=(str(data["dev"]),), test=(str(data["test"]),)
            )
        },
        "budget": Budget(flops=4e9),
        "fixed": fixed,
    }
    return Asked(**{**settings, **changes})


def planned(folder: Path, model: Path, data: dict[str, Path], **changes: Any) -> Plan:
    return plan_run(asked(model, data, **changes), folder, silent)[2]


def finish(folder: Path, say: Any = silent) -> None:
    """Select and train, without test or report."""
    with stages.at_work(RunFolder(folder), say) as work:
        stages.select(work, work.main)
        stages.train(work, work.main)


def ledger(folder: Path) -> Ledger:
    return RunFolder(folder).reading()


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def kill_at(monkeypatch: Any, step: int) -> None:
    """Every rank of a run is killed at the end of that step."""
    from thrifty.agreement import AgreeingCallback

    whole = AgreeingCallback.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, args, state, control, **kwargs)

    monkeypatch.setattr(AgreeingCallback, "on_step_end", killed)


def interrupt_at(monkeypatch: Any, step: int) -> None:
    """Ask for a pause, as a signal would, once ``step`` is done."""
    from thrifty.interruption import PauseCallback

    plain = PauseCallback.on_step_end

    def paused(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = self.asked or state.global_step == step
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(PauseCallback, "on_step_end", paused)
