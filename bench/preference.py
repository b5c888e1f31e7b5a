"""Training on pairs made of the mixed pool, in each way to ask the reference.

    python bench/preference.py SHARED/data [--flops 3e11] [--pairs 600]

Model: stories260K (a Llama of 260k parameters that writes children's stories). A pair is a question
of one domain, its own answer, and the answer of a question of another domain that is about as long.
Pool, dev and test share no question. Each way runs through the commands, in a process
of its own, under the same budget; the run folders stay, for their reports.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from material import heading
from thrifty.core.quantities import format_bytes
from thrifty.run_folder import RunFolder

MOST_CHARACTERS = 160
"""Of a question with its answer: stories260K reads 512 tokens of about two characters."""
NEAR = 50
"""Of the answers by length: another one is drawn from so many on either side."""
LIVE = "training.preference.precompute_ref_log_probs=false"
WAYS = {
    "all weights, precomputed": ["training.memory.trained=full"],
    "all weights, resident": ["training.memory.trained=full", LIVE],
    "LoRA, precomputed": ["training.memory.trained=lora"],
    "LoRA, adapter off": ["training.memory.trained=lora", LIVE],
}
FIXED = (
    "training.memory.weights=float32",
    "training.memory.activations=keep",
    "training.memory.states=adamw",
    "training.memory.loss={chunked: {tokens: 4096}}",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
)


def make_pairs(data: Path, domain: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Right answers against swapped ones, in random order."""
    table = pq.read_table(data / "mix" / "pool.parquet")
    own, others = [], []
    for row in table.select(["domain", "prompt", "response", "corrupt"]).to_pylist():
        length = len(row["prompt"]) + len(row["response"])
        if not row["corrupt"] and row["response"].strip() and length <= MOST_CHARACTERS:
            if row["domain"] == domain:
                own.append((row["prompt"], row["response"]))
            else:
                others.append(row["response"])
    others.sort(key=lambda answer: (len(answer), answer))
    rng, found = random.Random(seed), []
    for prompt, right in own:
        place = bisect_left(others, len(right), key=len)
        swapped = rng.choice(others[max(0, place - NEAR) : place + NEAR])
        found.append({"prompt": prompt + "\n", "chosen": right, "rejected": swapped})
    rng.shuffle(found)
    return list({row["prompt"]: row for row in found}.values())[:count]


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run_way(model: Path, files: dict[str, str], keys: list[str], flops: str, folder: Path) -> None:
    rate = "1e-4" if "training.memory.trained=lora" in keys else "1e-5"
    thrifty = [sys.executable, "-m", "thrifty"]
    plan = ["plan", "--task", "preference", "--model", str(model), "--scorer", "uniform"]
    plan += ["--pool", files["pool"], "--target", f"right={files['dev']}"]
    plan += ["--dev", f"right={files['dev']}", "--test", f"right={files['test']}"]
    for key in (*FIXED, f"training.learning_rate={rate}", *keys):
        plan += ["--set", key]
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*thrifty, *plan, "--flops", flops, "-o", str(folder)], **quiet)
    subprocess.run([*thrifty, "run", str(folder)], **quiet)


def row_of(way: str, folder: Path) -> list[str]:
    run = RunFolder(folder)
    plan = run.plan()
    with run.reading() as book:
        stages = {stage["name"]: stage for stage in book.stages()}
        spent = {
            name: book.spent(stage="train", activity=name).flops
            for name in ("train", "reference", "evaluate")
        }
        whole, test = book.spent(stage="train"), stages["test"]["detail"]
        dev = [each["objective"] for each in book.evaluations()]
    predicted = plan.predicted["train"]
    steps = stages["train"]["detail"]["steps"]
    return [
        way,
        f"{steps}",
        f"{dev[0]:.4f} {min(dev):.4f}",
        f"{test['before']:.4f} {test['after']:.4f} ± {test['change_stderr']:.4f}",
        f"{test['right']:.3f}",
        f"{test['likelier_before']:.3f} {test['likelier']:.3f}",
        f"{predicted['flops']:.3g} {whole.flops:.3g}",
        f"{spent['train'] / steps:.3g}",
        f"{spent['reference']:.3g}",
        f"{format_bytes(predicted['peak_memory_bytes'])} {format_bytes(whole.peak_memory_bytes)}",
        f"{whole.seconds:.0f} s",
    ]


HEADINGS = [
    "way", "steps", "dev loss before, after", "test loss before, after", "right",
    "better one likelier before, after", "FLOPs of training predicted, counted", "a step",
    "the reference once", "peak predicted, measured", "time",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--flops", default="3e11")
    parser.add_argument("--domain", default="sql")
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/preference"))
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    dev, test = options.pairs // 6, options.pairs // 3
    rows = make_pairs(options.data, options.domain, options.pairs + dev + test)
    parts = {"pool": rows[dev + test :], "dev": rows[:dev], "test": rows[dev : dev + test]}
    files = {name: write(options.output / f"{name}.jsonl", part) for name, part in parts.items()}
    table = [HEADINGS]
    for number, (way, keys) in enumerate(WAYS.items()):
        folder = options.output / f"way-{number}"
        run_way(options.data / "stories260K-hf", files, keys, options.flops, folder)
        table.append(row_of(way, folder))
        print("; ".join(table[-1]), file=sys.stderr, flush=True)
    what = f"{len(parts['pool']):,} {options.domain} pairs, {options.flops} FLOPs each"
    print(heading(f"stories260K on {what}"))
    print(f"{dev} dev and {test} test pairs; loss in nats a pair, right: of the test pairs\n")
    for line in (table[0], ["---"] * len(HEADINGS), *table[1:]):
        print(f"| {' | '.join(line)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
