"""Means to die at a numbered step, and to see what a power cut at that step would have left.

A step is what changes the names or the files of a folder: a file opened for writing, made, renamed,
removed or truncated, a folder made or removed, anything synced. ``die_at`` kills the process with
SIGKILL right before the n-th; ``forked`` does work in a fork, where Python and torch are loaded
already, so that every n = 1, 2, ... can be tried; as a program it is the command line that dies:

    python -m tests.reliability.injected N FOLDER run RUN

Steps are those of Python: what a library writes in C is between two of them, and SQLite's own
syncing is its own business.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHANGED = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, -1),),
}
"""Audited event -> which of its arguments are a path, and the open folder that it is within."""
ALL = 1_000_000
"""More steps than any work has."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OF_SQLITE = ("ledger.sqlite", ".counter")


def forked(work: Callable[[], object]) -> int:
    """Do ``work`` in a fork: 0 where it was done, minus the signal where it died, 1 where it raised
    (which is printed)."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # nothing of the parent's is cleaned up twice
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(number: int, folder: Path, disk: Disk | None = None) -> None:
    """From now on die before the ``number``-th step within ``folder``. Not to be undone: for a
    process of its own. ``disk`` notes what is synced."""
    home, seen, noting = folder.resolve(), 0, False

    def step(*paths: Path) -> None:
        nonlocal seen
        if any(path.is_relative_to(home) for path in paths):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if noting:
            return
        if event in _CHANGED:
            step(*(_path(arguments[at], arguments[within]) for at, within in _CHANGED[event]))
        elif event == "open" and not isinstance(arguments[0], int) and arguments[2] & _WRITING:
            step(_path(arguments[0]))

    plain = os.fsync

    def fsync(file: Any) -> None:
        nonlocal noting
        descriptor = file if isinstance(file, int) else file.fileno()
        path = _of(descriptor)
        step(path)
        plain(descriptor)
        if disk is not None:
            noting = True
            disk.synced(path, descriptor)
            noting = False

    os.fsync = fsync
    sys.addaudithook(heard)


def _path(name: Any, folder: Any = None) -> Path:
    """Absolute, of a name that may be relative to an open folder."""
    path = Path(os.fsdecode(name))
    if isinstance(folder, int) and folder > 0:
        path = _of(folder) / path
    return path.parent.resolve() / path.name


def _of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class Disk:
    """What a power cut would leave of ``folder``: of each file what was synced of it, nothing else;
    of each folder the names that it had when it was synced itself. What lay there when this was
    made is on the disk. Kept in ``store``, so that it outlives a killed process."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store
        self._open: list[int] = []
        store.mkdir()
        for path in [folder, *folder.rglob("*")]:
            self._note(path, path.stat())

    def synced(self, path: Path, descriptor: int) -> None:
        if path.is_relative_to(self.folder):
            self._note(path, os.fstat(descriptor))

    def _note(self, path: Path, known: os.stat_result) -> None:
        """An inode as it is now. It is held, for its number is not to be another's."""
        place = self.store / str(known.st_ino)
        if stat.S_ISDIR(known.st_mode):
            self._open.append(os.open(path, os.O_RDONLY))
            names = {p.name: [p.stat().st_ino, p.is_dir()] for p in path.iterdir()}
            draft = place.with_suffix(".new")
            draft.write_text(json.dumps(names))
            draft.replace(place.with_suffix(".names"))
            return
        if not (held := place.with_suffix(".held")).exists():
            os.link(path, held)
        shutil.copyfile(path, place.with_suffix(".new"))
        place.with_suffix(".new").replace(place.with_suffix(".data"))

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def left(self, target: Path) -> Path:
        """Make ``target`` what a power cut now would leave."""
        self._put(self.folder.stat().st_ino, target, is_folder=True)
        for path in self.folder.rglob("*"):  # SQLite syncs its own, the kernel the counters
            there = target / path.relative_to(self.folder)
            if any(mark in path.name for mark in _OF_SQLITE) and there.parent.is_dir():
                shutil.copyfile(path, there)
        return target

    def _put(self, number: int, target: Path, *, is_folder: bool) -> None:
        place = self.store / str(number)
        if is_folder:
            target.mkdir()
            names = place.with_suffix(".names")  # none: it was not synced, and is empty
            known = json.loads(names.read_text()) if names.is_file() else {}
            for name, (inner, is_inner) in known.items():
                self._put(inner, target / name, is_folder=is_inner)
        elif (data := place.with_suffix(".data")).is_file():
            shutil.copyfile(data, target)
        else:
            target.touch()  # a name, and nothing in it: neither it nor its content was synced


def each_step(
    folder: Path, work: Callable[[Path], object], home: Path, *, numbers: range | None = None
) -> Iterator[tuple[int, Path, Path, bool]]:
    """Do ``work`` on copies of ``folder`` and die at step 1, 2, ... (or at those ``numbers``) until
    it passes untouched.

    Yields of each the step, the copy as the killed process left it, as a power cut would have left
    it, and whether the work was done.
    """
    for number in numbers or range(1, ALL):
        place = home / f"step-{number}"
        there, store = place / "run", place / "disk"
        shutil.copytree(folder, there)
        disk = Disk(there, store)

        def broken(number: int = number, there: Path = there, disk: Disk = disk) -> None:
            die_at(number, there, disk)
            work(there)

        code = forked(broken)
        assert code in (0, -signal.SIGKILL), f"step {number}: exit {code}"
        disk.close()
        yield number, there, disk.left(place / "cut"), code == 0
        shutil.rmtree(place)
        if code == 0:
            return


if __name__ == "__main__":
    from thrifty.cli import main

    die_at(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
