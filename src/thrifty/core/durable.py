"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: Path, text: str) -> None:
    """All of ``text`` or the file as it was: written aside, synced, renamed, folder synced."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def rename_durably(aside: Path, path: Path) -> None:
    """Sync a file, or all files of a folder, then give it its name."""
    files = [aside] if aside.is_file() else [p for p in aside.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb+") as stream:  # for writing, or Windows syncs nothing
            os.fsync(stream.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An npz file of ``arrays``; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new.npz")
    plain: Any = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(draft, allow_pickle=False, **plain)
    rename_durably(draft, path)


def sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there; NTFS journals its entries
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
