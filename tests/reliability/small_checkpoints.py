"""Checkpoints of a few kilobytes, saved, committed and retained as those of a run. As a program,
which loads little and starts at once, it commits one:

    python -m tests.reliability.small_checkpoints FOLDER STEP
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from thrifty import checkpoints

CONTENT = {"model.safetensors": 3000, "optimizer.pt": 500, "for-others/model.safetensors": 200}


def save(folder: Path, step: int) -> Path:
    """A checkpoint's files, as a Trainer writes them: in place, unsynced."""
    checkpoint = folder / f"checkpoint-{step}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    for name, size in CONTENT.items():
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(step.to_bytes() * size)
    return checkpoint


def commit(folder: Path, step: int) -> None:
    checkpoints.commit(save(folder, step), {"step": step, "dev_loss": 1.0 / step})
    checkpoints.retain(folder, newest=2)


def check(folder: Path, steps: tuple[int, ...]) -> None:
    """That a whole one of these steps would be gone on with; then commit the last of them."""
    newest, _ = checkpoints.newest_whole(folder)
    assert newest is not None, f"{folder} has neither"
    assert newest.step in steps, f"{folder}: {newest.step}"
    for name, size in CONTENT.items():
        assert (newest.path / name).read_bytes() == newest.step.to_bytes() * size
    commit(folder, steps[-1])
    whole = checkpoints.committed(folder)
    assert [c.step for c in whole] == [2, 3]
    assert all(checkpoints.damage(c) is None for c in whole)


if __name__ == "__main__":
    commit(Path(sys.argv[1]), int(sys.argv[2]))
