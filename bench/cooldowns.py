"""Small fine-tuning runs whose learning rate is let down early, late or not at all: what a
cool-down brings, recorded for `bench/forecasts.py --own FILE`.

    OMP_NUM_THREADS=1 python bench/cooldowns.py --out runs.jsonl FOLDER=text.jsonl ...

FOLDER is a model, text.jsonl rows with a ``text`` (or ``prompt`` and ``completion``). A trunk at a
constant rate is left at several steps by branches that cool down over a quarter of what they have
had, as `schedule.py` does it. A line a run: its shares of the learning rate, steps, dev losses and
their paired standard errors.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from material import heading
from thrifty.schedule import WarmupStableDecay

STEPS, EVERY, LEAVES = 320, 10, (40, 80, 160, 320)
RATES = (3e-3, 1e-3)
BATCH, LENGTH, DEV = 4, 256, 64
WARMUP = 10


def chunks(path: Path, tokenizer: Any, most: int = 40_000) -> torch.Tensor:
    """[number, LENGTH] token ids of the rows on end."""
    ids: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row.get("text") or "\n".join((row["prompt"], row["completion"]))
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id or 0]
            if len(ids) > most * LENGTH:
                break
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


class Run:
    """A model in training on rows in a set order, with its history."""

    def __init__(self, folder: str, rows: torch.Tensor, dev: torch.Tensor, rate: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        self.rows, self.dev, self.rate = rows, dev, rate
        order = np.random.default_rng(0)
        self.order = np.concatenate([order.permutation(len(rows)) for _ in range(50)])
        self.steps: list[int] = []
        self.losses: list[np.ndarray] = []
        self.shares: list[float] = []

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            found = []
            for batch in self.dev.split(16):
                logits = self.model(batch).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), batch[:, 1:], reduction="none"
                )
                found.append(loss.mean(1))
        self.steps.append(len(self.shares))
        self.losses.append(torch.cat(found).double().numpy())

    def step(self, share: float) -> None:
        self.model.train()
        at = len(self.shares) * BATCH
        batch = self.rows[self.order[at : at + BATCH]]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * share
        self.model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.shares.append(share)

    def record(self, **what: Any) -> dict[str, Any]:
        losses = np.array(self.losses)
        change = np.diff(losses, axis=0).std(axis=1, ddof=1) / np.sqrt(losses.shape[1])
        first = losses[0].std(ddof=1) / np.sqrt(losses.shape[1])
        return {
            **what,
            "shares": [round(s, 6) for s in self.shares],
            "steps": self.steps,
            "losses": losses.mean(axis=1).tolist(),
            "stderrs": [float(first), *change.tolist()],
        }


def branches(name: str, folder: str, path: Path, rate: float) -> Iterator[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokens = chunks(path, AutoTokenizer.from_pretrained(folder))
    run = Run(folder, tokens[DEV:], tokens[:DEV], rate)
    run.evaluate()
    for leave in LEAVES:
        schedule = WarmupStableDecay(
            max_steps=leave + leave // 4, warmup_steps=WARMUP, cooldown_steps=leave // 4
        )
        while len(run.shares) < leave:
            run.step(schedule(len(run.shares)))
            if len(run.shares) % EVERY == 0:
                run.evaluate()
        branch = copy.copy(run)
        branch.model = copy.deepcopy(run.model)
        branch.optimizer = torch.optim.AdamW(branch.model.parameters(), weight_decay=0.0)
        branch.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for field in ("steps", "losses", "shares"):
            setattr(branch, field, list(getattr(run, field)))
        while len(branch.shares) < schedule.end:
            branch.step(schedule(len(branch.shares)))
            if len(branch.shares) == schedule.end:
                branch.evaluate()
        yield branch.record(run=name, rate=rate, leave=leave)
    yield run.record(run=name, rate=rate, leave=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("jobs", nargs="+", metavar="FOLDER=FILE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(heading("cool-downs of small fine-tuning runs"))
    with options.out.open("w", encoding="utf-8") as out:
        for job in options.jobs:
            folder, path = job.split("=")
            name = f"{Path(folder).name} on {Path(path).stem}"
            for rate in RATES:
                for found in branches(name, folder, Path(path), rate):
                    out.write(json.dumps(found) + "\n")
                    out.flush()
                    if found["leave"] is not None:
                        at = found["steps"].index(found["leave"])
                        before, after = found["losses"][at], found["losses"][-1]
                        print(
                            f"{name}, rate {rate:g}: left at {found['leave']} with {before:.4f}, "
                            f"cooled {after:.4f} ({100 * (1 - after / before):.2f}%)",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
