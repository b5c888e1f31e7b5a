"""The job of the soak: its commands, which phase one of them is in, whether two finished jobs are
the same."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from material import small_job
from thrifty.core.counter import read_counter
from thrifty.run_folder import RunFolder

AIMS = {
    "plan": ("plan", ()),
    "select": ("run", ("prepare", "score", "pick")),
    "refresh": ("run", ("probe", "refresh")),
    "train": ("run", ("train",)),
    "evaluate": ("run", ("evaluate",)),
    "checkpoint": ("run", ("checkpoint",)),
    "test": ("run", ("test",)),
    "report": ("report", ()),
    "decode": ("decode", ("decode",)),
}
"""What a kill aims at -> the command, and the leases that are open then (none: its files tell)."""
PHASE_OF = {activity: aim for aim, (_, names) in AIMS.items() for activity in names}
COMMANDS = ("plan", "run", "report", "decode")
SHOWN = ("plan.yaml", "model/model.safetensors", "decode/answers.jsonl", "selected/selected.jsonl")
EXACT = 1e-9
POLL_SECONDS = 0.004

SETTINGS = {
    "training.max_length": 64,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.memory.trained": "full",
    "training.max_steps": 80,
    "training.eval_steps": 10,
    "training.save_steps": 10,
    "training.warmup_steps": 2,
    "training.cooldown_steps": 8,
    "selection.max_tokens": 20_000,
    "selection.refresh.when": "fixed",
    "selection.refresh.times": 1,
    "selection.refresh.probe_rows": 64,
    "selection.refresh.shortlist": 0.1,
}


# -- the job ------------------------------------------------------------------------------------


def material(home: Path) -> dict[str, list[str]]:
    """The arguments of each command, but for the run folder."""
    job: Any = small_job(home, rows=6000)
    ((name, target),) = job["targets"].items()
    pool, prompts = home / "short.jsonl", home / "prompts.jsonl"
    rows = list(map(json.loads, Path(job["pool"][0]).read_text(encoding="utf-8").splitlines()))
    short = [{"prompt": r["prompt"][:60], "completion": r["completion"][:60]} for r in rows]
    pool.write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")
    asked = [{"id": i, "prompt": row["prompt"]} for i, row in enumerate(short[:12])]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    parts = {"--target": target.signal, "--dev": target.dev, "--test": target.test}
    rows_of = [f"{option}={name}={file}" for option, (file,) in parts.items()]
    # Headroom: no limit binds, so that all must come out the same.
    plan = ["--model", job["model"], "--pool", str(pool), *rows_of, "--flops=1e14"]
    plan += ["--scorer=loss", *(f"--set={key}={value}" for key, value in SETTINGS.items())]
    drawn = ["--policy={fixed: {samples: 3}}", "--max-tokens=16", "--concurrency=1"]
    decode = [f"--prompts={prompts}", "--answer=none", *drawn]
    return {"plan": plan, "run": [], "report": [], "decode": decode}


@dataclass
class Job:
    """A run folder and the commands that bring it to its end."""

    folder: Path
    arguments: dict[str, list[str]]

    @property
    def said(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.err")

    def start(self, command: str) -> subprocess.Popen[bytes]:
        where = ["-o", str(self.folder)] if command == "plan" else [str(self.folder)]
        line = [sys.executable, "-m", "thrifty", command, *where, *self.arguments[command]]
        with self.said.open("wb") as said:
            return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said)

    def begin(self) -> None:
        """Anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def open_leases(self, pid: int) -> list[tuple[int, str]]:
        """Number and activity of the leases that a process has open, or left so."""
        ledger = self.folder / "ledger.sqlite"
        if not ledger.is_file():
            return []
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=30)) as db:
            query = "SELECT id, activity FROM leases WHERE state = 'open' AND pid = ?"
            return list(db.execute(query, (pid,)))

    def is_in(self, aim: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether the process is in that phase."""
        if aim == "plan":
            return self.folder.with_name(f".{self.folder.name}.draft").is_dir()
        if aim == "report":
            try:
                files = psutil.Process(process.pid).open_files()
            except psutil.Error:  # it has just ended
                return False
            return any(Path(file.path).name == "ledger.sqlite" for file in files)
        return any(PHASE_OF.get(name) == aim for _, name in self.open_leases(process.pid))

    def spent_flops(self) -> float:
        """Charged, and counted by what is open."""
        with RunFolder(self.folder).reading() as ledger:
            total = ledger.spent().flops
            open_ones = ledger.reserved().flops
        if not open_ones:
            return total
        with closing(sqlite3.connect(f"file:{self.folder}/ledger.sqlite?mode=ro", uri=True)) as db:
            ids = [row[0] for row in db.execute("SELECT id FROM leases WHERE state = 'open'")]
        counted = [read_counter(self.folder / f"ledger-{number}.counter") for number in ids]
        return total + sum(found[1].flops for found in counted if found is not None)


# -- what is known of the untouched one ----------------------------------------------------------


@dataclass
class Reference:
    """The job that nobody touched, and how many seconds it took for each phase at a time."""

    job: Job
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        for command in COMMANDS:
            began = time.monotonic()
            marked = None
            process = self.job.start(command)
            while process.poll() is None:
                if marked is None and command in AIMS and self.job.is_in(command, process):
                    marked = time.monotonic()
                time.sleep(POLL_SECONDS)
            if process.returncode:
                sys.exit(f"the job that nobody touched failed:\n{self.job.said.read_text()}")
            self.seconds[command] = time.monotonic() - (marked or began)
        times = defaultdict(list)
        with RunFolder(self.job.folder).reading() as ledger:
            for charge in ledger.charges():
                if charge["activity"] in PHASE_OF:
                    times[PHASE_OF[charge["activity"]]].append(charge["seconds"])
        self.seconds |= {aim: sum(some) / len(some) for aim, some in times.items()}


def different(one: Path, other: Path) -> list[str]:
    """What is not the same in two finished run folders."""
    names = [p.relative_to(one).as_posix() for p in sorted((one / "refreshes").glob("*.npz"))]
    names += [p.relative_to(one).as_posix() for p in sorted((one / "selected").glob("*.npy"))]
    names += [
        p.relative_to(one).as_posix() for p in sorted((one / "selected/data").glob("*.arrow"))
    ]
    names += SHOWN
    found = [
        name
        for name in names
        if not (other / name).is_file() or (one / name).read_bytes() != (other / name).read_bytes()
    ]
    with RunFolder(one).reading() as book, RunFolder(other).reading() as other_book:
        keys = ("step", "objective", "stderr", "by_target")
        paths = [[[e[k] for k in keys] for e in each.evaluations()] for each in (book, other_book)]
    return [*found, *(["evaluations"] if paths[0] != paths[1] else [])]


def misbooked(one: Path, other: Path) -> list[str]:
    """Stages whose useful work is not what the untouched job has."""
    found = []
    with RunFolder(one).reading() as book, RunFolder(other).reading() as other_book:
        for stage in ("select", "train", "test"):
            for amount in ("flops", "tokens"):
                useful = [
                    getattr(each.spent(stage=stage, lost=False), amount)
                    for each in (book, other_book)
                ]
                if not math.isclose(*useful, rel_tol=EXACT):
                    found.append(f"{stage} {amount} {useful[0]:.9g} and {useful[1]:.9g}")
        took = [[row["took"]["flops"] for row in _samples(each)] for each in (one, other)]
        kept = [sum(each) for each in took]
        if not math.isclose(*kept, rel_tol=EXACT):
            found.append(f"decode {kept[0]:.9g} and {kept[1]:.9g}")
        useful = other_book.spent(stage="decode", lost=False).flops
        # A kill may fall between a sample's being written down and its being counted.
        if not kept[1] - max(took[1]) <= useful * (1 + EXACT) <= kept[1] * (1 + 2 * EXACT):
            found.append(f"decode useful {useful:.9g}, and {kept[1]:.9g} of samples")
        total, parts = other_book.spent(), [other_book.spent(lost=lost) for lost in (False, True)]
        if not math.isclose(total.flops, sum(part.flops for part in parts), rel_tol=EXACT):
            found.append("the sum of useful and lost")
    return found


def _samples(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "decode" / "samples.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
