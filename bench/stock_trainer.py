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
from thrifty.core.plan import Target
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
    """Of a checkpoint, JSON; one without it was not saved to its end."""
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

    def was_saving(self) -> bool:
        """Whether its newest checkpoint was not finished."""
        try:
            json.loads((self.saves()[-1] / self.last_file).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return True
        return False


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


def plan(folder: Path, job: dict[str, Any], *, max_steps: int, save_steps: int) -> None:
    fixed = {
        "training.max_length": 64,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.memory.trained": "full",
        "training.memory.weights": "float32",
        "training.max_steps": max_steps,
        "training.eval_steps": save_steps,
        "training.save_steps": save_steps,
        "selection.scorer": "uniform",
        "stopping": {"plateau": {"patience": max_steps}},  # never
    }
    asked = Asked(**job, budget=Budget(flops=1e16), fixed=fixed)
    preparation.plan_run(asked, folder, lambda line: None)


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
            log = run.log.read_text(errors="replace").rstrip()
            if not is_resume:
                raise SystemExit(f"{run.name} died and nobody had killed it:\n{log[-2000:]}")
            crashes[log.rpartition("\n")[2].partition(":")[0]] += 1
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
        hits += run.was_saving()


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


# -- the tables ---------------------------------------------------------------------------------


def report_kills(runs: list[Run], options: argparse.Namespace) -> int:
    """Returns how many resumes of thrifty's, which come last, crashed."""
    rows = []
    for run in runs:
        kills, hits, crashes = kill(run, options.kills, options.seed, 30 * options.minutes)
        errors = ", ".join(f"{count} {error}" for error, count in crashes.most_common())
        rows.append((run.name, kills, hits, crashes.total(), errors or "-"))
    headers = ("", "kills", "of them in a save", "resumes that crashed", "with")
    print(heading("Killed at random instants, with a save at every step"))
    print(display.table(headers, rows, right="lrrrl"), flush=True)
    return crashes.total()


def report_nan(runs: list[Run]) -> int:
    """Returns how many of thrifty's runs, which come after the first, were left with nothing."""
    rows, lost = [], 0
    for run in runs:
        run.command = Poisoned(run.command)
        process = run.start()
        process.join()
        healthy, kept = num_healthy(run), len(run.saves())
        lost += run is not runs[0] and not healthy
        rows.append((run.name, said(run), process.exitcode, f"{healthy} of {kept}"))
    headers = ("", "from then on", "exit code", "healthy checkpoints")
    print(heading(f"\nA loss that is NaN at step {BAD_STEP} of {STEPS}"))
    print(display.table(headers, rows, right="llrr"))
    return lost


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
    # Few dev rows: evaluations would take most of the time, and kills would seldom hit a save.
    pool, few = Path(job["pool"][0]), home / "few.jsonl"
    few.write_text("".join(pool.read_text(encoding="utf-8").splitlines(True)[:8]), encoding="utf-8")
    job["targets"] = {"few": Target(signal=(str(few),), dev=(str(few),))}

    def stock(name: str, folder: str, budget: str | None = None, **arguments: Any) -> Run:
        arguments |= {"output_dir": str(home / folder), "save_strategy": "steps"}
        command = Stock(str(job["model"]), arguments, budget)
        return Run(name, home / folder, "trainer_state.json", command)

    def thrifty(folder: str, **settings: int) -> Run:
        plan(home / folder, job, **settings)
        checkpoints = RunFolder(home / folder).checkpoints("budget")
        return Run("thrifty run", checkpoints, "manifest.json", Thrifty(home / folder))

    crashed = report_kills(
        [
            stock("HF Trainer", "killed", max_steps=3000, save_steps=1, save_total_limit=3),
            thrifty("killed-thrifty", max_steps=3000, save_steps=1),
        ],
        options,
    )
    short: dict[str, Any] = {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 2}
    lost = report_nan(
        [
            stock("HF Trainer", "nan", **short),
            stock("HF Trainer, BudgetCallback", "nan-callback", "1e15", **short),
            thrifty("nan-thrifty", max_steps=STEPS, save_steps=2),
        ]
    )
    shutil.rmtree(home)
    return int(crashed + lost > 0)


if __name__ == "__main__":
    sys.exit(main())
