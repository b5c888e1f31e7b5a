"""Two faults of the stock Hugging Face ``Trainer``, and the same done to thrifty.

    python bench/stock_trainer.py [--kills 22] [--seed 0] [--minutes 4]

Killed: SIGKILL at random instants of a run that saves at every step, then the automatic resume
(``resume_from_checkpoint=True``; ``thrifty run``). After a resume that crashed, the newest
checkpoint is deleted by hand and the run goes on to its next kill.

Not a number: the loss of step 4 of 12 is NaN, with a checkpoint at every second step and the newest
two kept (``save_total_limit=2``).

``BudgetCallback`` leaves saving to the Trainer that it is in: only the second is asked of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from material import heading, small_job
from thrifty import display, preparation
from thrifty.core.budget import Budget
from thrifty.preparation import Asked
from thrifty.run_folder import RunFolder

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.llama", "thrifty.stages"]
)
BAD_STEP, STEPS = 4, 12


@dataclass
class Run:
    """A training run as its user starts it, each time in a process of its own."""

    name: str
    checkpoints: Path
    last_file: str
    """Of a checkpoint; one without it was not saved to its end."""
    command: Callable[[], int]

    @property
    def log(self) -> Path:
        return self.checkpoints.with_suffix(".log")

    def start(self) -> ForkServerProcess:
        process = FORKED.Process(target=_logged, args=(self.log, self.command))
        process.start()
        return process

    def saves(self) -> list[Path]:
        """Its checkpoints, whole or not, oldest first."""
        found = self.checkpoints.glob("checkpoint-*")
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _logged(log: Path, command: Callable[[], int]) -> None:
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.exit(command())


# -- what runs in those processes ---------------------------------------------------------------


@dataclass
class Stock:
    """A plain Trainer that goes on where it has checkpoints."""

    base: str
    arguments: dict[str, Any]
    budget: str | None = None
    """Of FLOPs, held by ``BudgetCallback``; None: without one."""

    def __call__(self) -> int:
        import torch
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        from thrifty import BudgetCallback

        rows = torch.randint(0, 1024, (4096, 64), generator=torch.Generator().manual_seed(0))
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(self.base),
            args=TrainingArguments(
                per_device_train_batch_size=2,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                **self.arguments,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[BudgetCallback(flops=self.budget)] if self.budget else [],
        )
        output = Path(self.arguments["output_dir"])
        trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
        return 0


@dataclass
class Thrifty:
    """``thrifty run FOLDER``"""

    folder: Path

    def __call__(self) -> int:
        from thrifty.cli import main

        return main(["run", str(self.folder)])


@dataclass
class Poisoned:
    """Another command, with a loss that is NaN at the bad step."""

    command: Callable[[], int]

    def __call__(self) -> int:
        from transformers import Trainer

        plain = Trainer.compute_loss

        def compute_loss(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            bad = trainer.state.global_step == BAD_STEP - 1
            return plain(trainer, *args, **kwargs) * (float("nan") if bad else 1.0)

        Trainer.compute_loss = compute_loss
        return self.command()


def planned(folder: Path, job: dict[str, Any], *, max_steps: int, save_steps: int) -> Path:
    fixed = {
        "training.max_length": 64,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.method": "full",
        "training.dtype": "float32",
        "training.max_steps": max_steps,
        "training.eval_steps": save_steps,
        "training.save_steps": save_steps,
        "selection.scorer": "uniform",
        "stopping": {"plateau": {"patience": max_steps}},  # never
    }
    asked = Asked(**job, budget=Budget(flops=1e16), fixed=fixed)
    preparation.plan_run(asked, folder, lambda line: None)
    return folder


# -- killed -------------------------------------------------------------------------------------


def goes_on(run: Run, process: ForkServerProcess, began: float) -> bool:
    """Wait until a checkpoint has begun since ``began``; False where the process ended before."""
    while process.is_alive():
        for path in run.saves():
            try:
                if path.stat().st_mtime > began:
                    return True
            except FileNotFoundError:  # retention was quicker
                continue
        time.sleep(0.005)
    return False


def kill(run: Run, kills: int, seed: int, seconds: float) -> tuple[int, int, Counter[str]]:
    """So many kills, as far as ``seconds`` last; those that hit a save; what resumes died of."""
    rng, until = random.Random(seed), time.monotonic() + seconds
    done, hits, crashes, is_resume = 0, 0, Counter[str](), False
    while True:
        began = time.time()
        process = run.start()
        if not goes_on(run, process, began):
            error = run.log.read_text(errors="replace").rstrip().rpartition("\n")[2]
            if not is_resume:
                raise SystemExit(f"{run.name} died and nobody had killed it: {error}")
            crashes[error.partition(":")[0]] += 1
            is_resume = False
            shutil.rmtree(run.saves()[-1])
            continue
        is_resume = done < kills and time.monotonic() < until
        if is_resume:
            time.sleep(rng.uniform(0, 1))
        process.kill()
        process.join()
        if not is_resume:
            return done, hits, crashes
        done += 1
        hits += not (run.saves()[-1] / run.last_file).is_file()


# -- not a number -------------------------------------------------------------------------------


def said(run: Run) -> str:
    """Of the bad step and what came after it: the error, or the losses that were logged."""
    for line in run.log.read_text(errors="replace").splitlines():
        if "is not finite" in line:
            return line.partition(": ")[2].partition(";")[0]
    state = json.loads((run.saves()[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    rows = [row for row in state["log_history"] if "loss" in row and row["step"] >= BAD_STEP]
    losses = ", ".join(sorted({str(row["loss"]) for row in rows}))
    return f"loss {losses} at {len(rows)} steps"


def num_healthy(run: Run) -> int:
    """How many of the kept checkpoints have finite weights."""
    import torch
    from safetensors.torch import load_file

    states = [load_file(path / "model.safetensors") for path in run.saves()]
    return sum(all(bool(torch.isfinite(w).all()) for w in state.values()) for state in states)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=4.0, help="for the kills, at most")
    options = parser.parse_args()
    # Killed runs cannot give their locks back, which Python would remark on at the end.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    home = Path(tempfile.mkdtemp(prefix="thrifty-stock-"))
    job = small_job(home, rows=1000, hidden_size=256)

    def stock(name: str, budget: str | None = None, **arguments: Any) -> Run:
        folder = home / name.replace(" ", "-")
        arguments |= {"output_dir": str(folder), "save_strategy": "steps"}
        command = Stock(str(job["model"]), arguments, budget)
        return Run(name.partition(":")[0], folder, "trainer_state.json", command)

    def thrifty(name: str, **settings: int) -> Run:
        folder = planned(home / name.replace(" ", "-"), job, **settings)
        checkpoints = RunFolder(folder).checkpoints("budget")
        return Run(name.partition(":")[0], checkpoints, "manifest.json", Thrifty(folder))

    rows, failed = [], 0
    for run in (
        stock("HF Trainer", max_steps=3000, save_steps=1, save_total_limit=3),
        thrifty("thrifty run", max_steps=3000, save_steps=1),
    ):
        kills, hits, crashes = kill(run, options.kills, options.seed, 30 * options.minutes)
        failed = crashes.total()  # thrifty's in the end
        errors = ", ".join(f"{count} {error}" for error, count in crashes.most_common())
        rows.append((run.name, str(kills), str(hits), str(crashes.total()), errors or "-"))
    print(heading("Killed at random instants, with a save at every step"))
    headers = ("", "kills", "of them in a save", "resumes that crashed", "with")
    print(display.table(headers, rows, right="lrrrl"))

    rows = []
    for run in (
        stock("HF Trainer: NaN", max_steps=STEPS, save_steps=2, save_total_limit=2),
        stock(
            "HF Trainer, BudgetCallback: NaN",
            "1e15",
            max_steps=STEPS,
            save_steps=2,
            save_total_limit=2,
        ),
        thrifty("thrifty run: NaN", max_steps=STEPS, save_steps=2),
    ):
        run.command = Poisoned(run.command)
        process = run.start()
        process.join()
        healthy = num_healthy(run)
        failed += run.name.startswith("thrifty") and not healthy
        rows.append(
            (run.name, said(run), str(process.exitcode), f"{healthy} of {len(run.saves())}")
        )
    print(heading(f"\nA loss that is NaN at step {BAD_STEP} of {STEPS}"))
    print(
        display.table(("", "from then on", "exit code", "healthy checkpoints"), rows, right="llrr")
    )
    shutil.rmtree(home)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
