"""Files that are there whole or not at all, also after a power cut.

What a power cut keeps is what was synced: of a file its content, of a folder the names in it. So a
file is synced before it is given its name, and then the folder that the name is in.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """All of ``text`` or the file as it was: written aside, synced, renamed, folder synced."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except BaseException:  # a full disk, say: what is no use is not to fill it
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def rename_durably(aside: Path, path: Path) -> None:
    """Sync a file, or a folder with all that is in it, then give it its name."""
    if aside.is_file():
        sync_file(aside)
    else:
        sync_tree(aside)
    aside.replace(path)
    sync_folder(path.parent)


def replace_folder(aside: Path, path: Path) -> None:
    """``rename_durably`` of a folder, in place of the one of that name if there is one: which is
    never seen half removed."""
    sync_tree(aside)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.replace(old)
    aside.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """With those above it, and their names on the disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """All files in a folder and in those below, then the names in them."""
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(inner, name))
        sync_folder(Path(inner))


def sync_file(path: Path) -> None:
    """Its content."""
    with path.open("rb+" if os.name == "nt" else "rb") as stream:  # Windows syncs what is written
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """The names in it."""
    if os.name == "nt":  # pragma: no cover: of another platform
        return  # a folder cannot be opened there; NTFS journals its entries
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
