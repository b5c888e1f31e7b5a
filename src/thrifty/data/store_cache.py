"""Stores kept for the next plan: reading and tokenising a large pool takes longer than planning on
it, and a budget is often guessed a few times before a plan fits.

    CACHE/rows/KEY/      a finished store, as ``store.py`` writes it

A key hashes everything that decides what a store holds: the files (names, sizes, times of change),
the tokenizer, ``max_length``, the task, and the code that reads. Files at URLs tell none of this at
no cost, so they are read anew. A store goes in and comes out as a copy, never as a link: whatever
happens to a run's own files afterwards reaches no other run. It is checked against its hashes on
its way out, and a damaged one is no store.

Safe against kills and against other plans at the same time: an entry appears by a rename, whole,
and a copy that another process takes away half-way is a miss. ``THRIFTY_ROWS_CACHE_GIB`` bounds the
entries' bytes (5 GiB unless it says otherwise; what was used longest ago goes first); 0 switches
the cache off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from thrifty.core.best_effort import keeping
from thrifty.core.durable import rename_durably
from thrifty.costs.hardware import GIB, cache_folder
from thrifty.data.sources import expand, is_url
from thrifty.data.store import FORMAT, StoreManifest, open_store

VARIABLE = "THRIFTY_ROWS_CACHE_GIB"
DEFAULT_GIB = 5.0
_DRAFT_SECONDS = 86_400.0
"""Older drafts are what kills left."""


def key_of(sources: Sequence[str], *parts: object) -> str | None:
    """What a store of ``sources`` is kept under; None where files cannot tell that they changed.

    ``parts`` are all else that decides what the store holds.
    """
    if most_bytes() == 0 or any(map(is_url, sources)):
        return None
    digest = hashlib.sha256(json.dumps([FORMAT, _code(), *map(str, parts)]).encode())
    for file in expand(sources):
        path = Path(file.location).resolve()
        try:
            seen = path.stat()
        except OSError:  # reading will say what is wrong
            return None
        known = [str(path), file.name, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]
        digest.update(json.dumps(known).encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """A hash of what reads rows and tokenises them, so that a mended reader reads anew."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for package in ("tokenizers", "transformers", "pyarrow", "orjson"):
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()


def fetch(key: str | None, directory: Path) -> StoreManifest | None:
    """Copy the store of ``key`` to ``directory``; None where there is none, or a damaged one."""
    if key is None:
        return None
    entry, draft = _folder() / key, directory.with_name(f".{directory.name}.draft")
    if not entry.is_dir():
        return None
    try:
        shutil.copytree(entry, draft)
    except OSError:  # taken away half-way, or there is no room for it here
        shutil.rmtree(draft, ignore_errors=True)
        return None
    try:
        store = open_store(draft)
        store.verify()
    except (OSError, ValueError):  # damaged
        shutil.rmtree(draft, ignore_errors=True)
        _remove(entry)
        return None
    with suppress(OSError):  # of a cache that can be read alone
        os.utime(entry)
    rename_durably(draft, directory)
    return store.manifest


def keep(key: str | None, directory: Path) -> None:
    """Keep a copy of the finished store in ``directory``, if possible."""
    most = most_bytes()
    if key is None or _size(directory) > most:
        return
    folder = _folder()
    draft = folder / f".{key}.{uuid4().hex}"
    try:
        with keeping(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copytree(directory, draft)
            os.utime(draft)  # used now, whenever the store was made
            rename_durably(draft, folder / key)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _trim(folder, most)


def most_bytes() -> float:
    """Of all entries together. Raises ValueError where the environment says nothing sensible."""
    text = os.environ.get(VARIABLE, "").strip() or str(DEFAULT_GIB)
    try:
        size = float(text)
        if not 0 <= size < 1e9:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{VARIABLE} must be a number of GiB, not {text!r:.40}\n"
            "hint: 5, or 0 to keep no tokenised rows"
        ) from None
    return size * GIB


def _folder() -> Path:
    return cache_folder() / "rows"


def _trim(folder: Path, most: float) -> None:
    """Drop what was used longest ago until the rest is small enough, and drafts of killed plans."""
    entries = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):  # another plan dropped it
            used = path.stat().st_mtime
            if not path.name.startswith("."):
                entries.append((used, path, _size(path)))
            elif used < time.time() - _DRAFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    total = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if total <= most:
            break
        _remove(path)
        total -= size


def _remove(entry: Path) -> None:
    """Renamed first: what is half deleted is no entry."""
    gone = entry.with_name(f".{entry.name}.{uuid4().hex}")
    with suppress(OSError):
        entry.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
