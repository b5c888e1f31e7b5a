"""What the files of a folder were when they were written: its SHA256SUMS, which anybody may check
with ``sha256sum -c``.

A file is noted before it gets its name, and looked at before it is used, once a process: that takes
about as long as reading it. What is not noted (a file of an older thrifty's, or of somebody else's)
is not looked at.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

from thrifty.core.durable import rename_durably, write_atomically

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def keep(aside: Path, path: Path) -> None:
    """Sync a finished file, note it and give it its name."""
    notes, digest = path.parent / NAME, sha256_of(aside)
    lines = _lines(notes)
    before = [line for line in lines if line[len(digest) :] == f"  {path.name}"]
    line = f"{digest}  {path.name}"
    if not notes.is_file() or before:  # both, for a kill may fall before the new one has its name
        _write(notes, [*lines, line])
    else:
        _append(notes, line)
    rename_durably(aside, path)
    if before:
        _write(notes, [*(each for each in lines if each not in before), line])


def write(path: Path, text: str) -> None:
    """A small file, noted."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        keep(aside, path)
    except BaseException:  # a full disk, say: what is no use is not to fill it
        aside.unlink(missing_ok=True)
        raise


def note_all(folder: Path) -> None:
    """Note every file of a folder that is finished, those of its folders too."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    lines = [f"{sha256_of(folder / name)}  {name}" for name in names if name != NAME]
    _write(folder / NAME, lines)


def check(path: Path, hint: str) -> None:
    """Raise ValueError where the file is there, and not as it is noted beside it."""
    known = _noted(path.parent).get(path.name)
    if known and path.is_file() and not is_as(path, known):
        raise ValueError(
            f"{path} is damaged: it is not as it was written, which {NAME} beside it tells\n"
            f"hint: {hint}"
        )


def check_all(folder: Path, hint: str) -> None:
    """Raise ValueError for the first file of a folder that is not as it is noted."""
    for fault in faults(folder):
        raise ValueError(f"{fault}\nhint: {hint}")


def faults(folder: Path, but: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with the files that are noted in a folder, in words; ``but``: files that
    people may edit."""
    notes = folder / NAME
    for line in _lines(notes):
        if not _LINE.fullmatch(line):
            yield f"{notes} is damaged: {line[:80]!r} is no hash and name"
    for name, known in _noted(folder).items():
        path = folder / name
        if name in but:
            continue
        if not path.is_file():
            yield f"{path}, which {NAME} there names, is missing"
        elif not is_as(path, known):
            yield f"{path} is damaged: it is not as it was written, says {NAME} there"


def is_as(path: Path, known: Collection[str]) -> bool:
    """Whether a file has one of these hashes; it is read once a process, as long as it stays."""
    seen = path.stat()
    return _seen(path, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns) in known


@lru_cache(maxsize=1 << 16)
def _seen(path: Path, *as_it_lies: int) -> str:
    return sha256_of(path)


def _noted(folder: Path) -> dict[str, frozenset[str]]:
    """Of each file what it may be: for an instant it is noted as it was and as it will be."""
    notes = folder / NAME
    seen = notes.stat() if notes.is_file() else None
    return _parsed(notes, seen.st_size, seen.st_mtime_ns) if seen else {}


@lru_cache(maxsize=64)
def _parsed(notes: Path, *as_it_lies: int) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for line in _lines(notes):
        if match := _LINE.fullmatch(line):
            found.setdefault(match[2], set()).add(match[1])
    return {name: frozenset(known) for name, known in found.items()}


def _lines(notes: Path) -> list[str]:
    """Whole ones: one that was being added by a process that was killed names nothing."""
    if not notes.is_file():
        return []
    text = notes.read_bytes().decode("utf-8", "replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def _append(notes: Path, line: str) -> None:
    with notes.open("rb+") as stream:
        data = stream.read()
        stream.truncate(stream.seek(data.rfind(b"\n") + 1))
        stream.write(f"{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def _write(notes: Path, lines: list[str]) -> None:
    write_atomically(notes, "".join(f"{line}\n" for line in lines))
