"""Training under ``BudgetCallback`` against the plain ``Trainer`` with the same arguments.

    python bench/callback_overhead.py [--rounds 8]

Interleaved rounds of one and the other; the ratio of the throughputs of each pair.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from material import heading, small_job
from thrifty import BudgetCallback


class Rows(Dataset):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 1024, (128,), generator=torch.Generator().manual_seed(item))
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Seconds from the end of the first step, which warms up, to the end of the last: of this
    process's processor time where it computes on the CPU, which other processes cannot take."""

    def __init__(self):
        self.now = time.perf_counter if torch.cuda.is_available() else time.process_time

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.start = self.now()
        self.seconds = self.now() - self.start


def run(base: str, steps: int, callbacks: list) -> float:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(base),
            args=arguments,
            train_dataset=Rows(),
            callbacks=[*callbacks, clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="thrifty-overhead-"))
    base = str(small_job(home, rows=100)["model"])
    run(base, 5, [])
    ratios, plain_times = [], []
    for number in range(options.rounds):
        first = number % 2 == 0  # who goes first alternates, as the machine's speed drifts
        pair = {}
        for with_budget in (first, not first):
            ledger = home / f"{number}-{with_budget}.sqlite"
            limits = BudgetCallback(flops=1e18, hours=10, ledger=ledger)
            pair[with_budget] = run(base, options.steps, [limits] if with_budget else [])
        ratios.append(pair[False] / pair[True])
        plain_times.append(pair[False])
        print(f"pair {number + 1}: {ratios[-1]:.3f}", flush=True)
    print(heading("Throughput under BudgetCallback over the plain Trainer's"))
    low, high = min(ratios), max(ratios)
    print(
        f"median ratio {statistics.median(ratios):.3f} (from {low:.3f} to {high:.3f}, "
        f"{options.rounds} pairs of {options.steps} steps; plain step "
        f"{1000 * statistics.median(plain_times):.1f} ms); asked: at least 0.98"
    )


if __name__ == "__main__":
    main()
