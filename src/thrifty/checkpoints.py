"""Checkpoints that are whole or not there: committed by a manifest, resumed from the newest that
verifies, retained by step.

A checkpoint counts once its ``manifest.json`` (every file's size and SHA-256, the base model's
hash, and a hash of all that it says) is in place; it is written last, by rename, after every file
and the folder were synced. A folder without it, or that differs from it, is set aside under
``torn-...`` and never resumed from.
Retention goes by step number over committed checkpoints, so that a clock that jumps deletes
nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from thrifty.core.durable import sync_folder, sync_tree, write_atomically
from thrifty.core.sealed import read_sealed, sealed
from thrifty.core.sums import sha256_of

MANIFEST = "manifest.json"
FOR_OTHERS = "for-others"
"""In a checkpoint: the model as stock libraries load it, where the checkpoint itself is another."""
KEPT = 2
"""Of a training, the newest so many; the best one too."""
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder."""

    path: Path
    step: int
    manifest: Mapping[str, Any]

    @property
    def dev_loss(self) -> float | None:
        return self.manifest.get("dev_loss")

    @property
    def may_be_kept(self) -> bool:
        """Whether it was evaluated, and broke no floor."""
        return self.dev_loss is not None and not self.manifest.get("broken")


def commit(folder: Path, details: Mapping[str, Any]) -> None:
    """Make ``folder`` a checkpoint: sync its files, then write the manifest. ``details`` go in."""
    sync_tree(folder)
    for above in (folder.parent, folder.parent.parent):  # the checkpoints' own folder may be new
        sync_folder(above)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, sha256_of(path)]
    manifest = sealed({**details, "files": files})
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def committed(folder: Path) -> list[Checkpoint]:
    """Committed checkpoints in ``folder``, oldest first, files not yet verified."""
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and (path / MANIFEST).is_file():
            try:
                manifest = read_sealed(path / MANIFEST)
            except (ValueError, OSError):
                continue
            found.append(Checkpoint(path, int(number), manifest))
    return sorted(found, key=lambda c: c.step)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is not as the manifest says, or None."""
    step = checkpoint.manifest.get("step", checkpoint.step)
    if step != checkpoint.step:
        return f"{MANIFEST} is of step {step}"
    for name, (size, digest) in checkpoint.manifest["files"].items():
        path = checkpoint.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256_of(path) != digest:
            return f"{name} has changed"
    return None


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each that had to be set aside."""
    if not folder.is_dir():
        return None, []
    notes = []
    known = {c.path: c for c in committed(folder)}
    newest: Checkpoint | None = None
    for path in folder.glob(f"{_PREFIX}*"):
        if path not in known:
            is_there = (path / MANIFEST).is_file()
            why = f": {MANIFEST} is damaged" if is_there else " was never committed"
            notes.append(f"{path.name}{why}")
            _set_aside(path)
    for checkpoint in sorted(known.values(), key=lambda c: -c.step):
        what = damage(checkpoint)
        if what is None:
            newest = checkpoint
            break
        notes.append(f"{checkpoint.path.name}: {what}")
        _set_aside(checkpoint.path)
    return newest, notes


def _set_aside(path: Path) -> None:
    """Kept for a look, two at the most, so that repeated kills do not fill the disk."""
    for old in sorted(path.parent.glob("torn-*"), key=lambda p: p.stat().st_mtime)[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    names = (f"torn-{path.name}" + (f"-{number}" if number else "") for number in count())
    path.rename(next(aside for name in names if not (aside := path.with_name(name)).exists()))


def retain(folder: Path, *, newest: int) -> None:
    """Delete committed checkpoints but the ``newest`` few and the one that ``best`` would name.

    Those that lost files, or bytes of them, take nobody's place: that costs a look at sizes. What
    was committed is known to be whole otherwise, until ``newest_whole`` reads all of it.
    """
    found = committed(folder)
    whole = [c for c in found if _has_its_bytes(c)]
    keep = {c.path for c in whole[-newest:]}
    scored = [c for c in whole if c.may_be_kept]
    if scored:
        keep.add(min(scored, key=lambda c: (c.dev_loss, -c.step)).path)
    for checkpoint in found:
        if checkpoint.path not in keep:
            # Without its manifest first: a kill half-way leaves a torn folder, not a damaged one.
            (checkpoint.path / MANIFEST).unlink()
            shutil.rmtree(checkpoint.path)


def _has_its_bytes(checkpoint: Checkpoint) -> bool:
    """Whether all its files are there, as long as they were."""
    files = {
        checkpoint.path / name: size for name, (size, _) in checkpoint.manifest["files"].items()
    }
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def best(folder: Path) -> Checkpoint | None:
    """Of the committed checkpoints that verify and break no floor the one with the lowest dev loss;
    damaged ones are set aside."""
    scored = [c for c in committed(folder) if c.may_be_kept]
    for checkpoint in sorted(scored, key=lambda c: (c.dev_loss, -c.step)):
        if damage(checkpoint) is None:
            return checkpoint
        _set_aside(checkpoint.path)
    return None
