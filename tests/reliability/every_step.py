"""``thrifty run`` dies at numbered steps, and the power is cut there; done again, it must end like
one that nobody touched. A program, since torch may not have computed before it forks:

    python -m tests.reliability.every_step PLANNED HOME [FIRST LAST EVERY]

tries the steps from FIRST to LAST of a run that is planned, every EVERY-th of them, and prints how
many, and what they left where something came out otherwise. Exit code 1 where something did.
"""

from __future__ import annotations

import gc
import importlib
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.reliability.injected import ALL, each_step, forked
from tests.runs import ledger, silent
from thrifty import pipeline

FILES = ("model/model.safetensors", "selected/selected.jsonl", "selected/ids.npy")


def run(folder: Path) -> None:
    pipeline.run(folder, silent)


def unlike(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ that must not."""
    names = [*FILES, *(p.relative_to(one).as_posix() for p in (one / "refreshes").glob("*.npz"))]
    found = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    with ledger(one) as book, ledger(other) as other_book:
        keys = ("stage", "step", "objective", "stderr", "by_target")
        paths = [[[e[key] for key in keys] for e in b.evaluations()] for b in (book, other_book)]
        if paths[0] != paths[1]:
            found.append("evaluations")
        for stage in ("select", "train", "test"):
            for name in ("flops", "tokens"):
                useful = [b.spent(stage=stage, lost=False).of(name) for b in (book, other_book)]
                if not math.isclose(*useful, rel_tol=1e-9):
                    found.append(f"useful {name} of {stage}: {useful[0]:.6g}, {useful[1]:.6g}")
        if any(amount < 0 for amount in other_book.left().values()):
            found.append("overspent")
    return found


def loaded_by(work: Callable[[], object], note: Path) -> list[str]:
    """Do ``work`` in a fork; the modules that it had loaded at its end."""

    def noted() -> None:
        work()
        note.write_text("\n".join(sys.modules))

    assert forked(noted) == 0
    return note.read_text().splitlines()


def main(planned: Path, home: Path, first: int = 1, last: int = ALL, every: int = 1) -> int:
    whole = home / "whole"
    shutil.copytree(planned, whole)
    # Loaded once, before the forks, instead of in each of them: most of what a short run takes.
    for name in loaded_by(lambda: run(whole), home / "modules"):
        with suppress(Exception):  # some can only be loaded by another
            importlib.import_module(name)
    gc.freeze()  # a fork's collections need not look through them
    tried = bad = number = 0
    numbers = range(first, last + 1, every)
    for number, killed, cut, _ in each_step(planned, run, home / "steps", numbers=numbers):
        for folder, how in ((killed, "killed"), (cut, "power cut")):
            lay = sorted(path.name for path in (folder / "checkpoints").glob("*"))
            code = forked(lambda folder=folder: run(folder))
            wrong = unlike(whole, folder) if not code else [f"exit {code}"]
            tried += 1
            bad += bool(wrong)
            if wrong:
                print(f"step {number}, {how}, after {lay}: {'; '.join(wrong)}", flush=True)
    print(f"up to step {number}: {tried} resumed, {bad} otherwise")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])))
