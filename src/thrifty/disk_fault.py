"""A disk that is full, fails or cannot be written, told in one way.

Python says it with an errno; PyTorch, NumPy, safetensors and SQLite each in their own words, in the
midst of which the errno is lost. What was left half written goes, so that there is room for what is
whole; the same command then goes on from there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thrifty.core import headroom, quantities

FULL = (errno.ENOSPC, errno.EDQUOT)
FAULTS = (*FULL, errno.EIO, errno.EROFS)
_OF_SQLITE = {"SQLITE_FULL": errno.ENOSPC, "SQLITE_READONLY": errno.EROFS}
_ERRNO_IN_WORDS = re.compile(r"\bos error (\d+)\b")  # of Rust, so of safetensors and tokenizers
_WRITING_FAILED = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+ vs|\d+ requested and \d+ written"
    r"|basic_ios::clear: iostream error|^disk I/O error$|^unable to open database file$"
)
"""Of PyTorch, NumPy and SQLite, which do not say why."""
_UNFINISHED = re.compile(r"\..+\.(new|draft|\d+)|.+\.new|.+\.new\.npz|torn-.+|checkpoint-\d+")
_MANIFEST = "manifest.json"


class DiskFault(OSError):
    """What happened, where, how many bytes it takes, and what to do: all of it in its text."""

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def told(folder: Path, what: str, needs: Callable[[], tuple[float, str]]) -> Iterator[None]:
    """Raise a fault of the disk in the midst as DiskFault, once what it left half written in
    ``folder`` is gone. ``needs``: bytes that are still to be written, and in words what they are.
    """
    try:
        yield
    except Exception as error:
        number = fault_of(error, folder)
        if number is None or isinstance(error, DiskFault):
            raise
        prune(folder)
        left = None
        with suppress(OSError):  # on a disk that fails, to ask may fail too
            left = needs()
        where = where_of(error, folder)
        raise DiskFault(number, described(number, where, f" while {what}", left)) from error


def described(
    number: int, where: Path, when: str = "", needs: tuple[float, str] | None = None
) -> str:
    """In words, with a hint."""
    said = f"{os.strerror(number)}{when}: {where}"
    if number not in FULL:
        mend = "mount it for writing" if number == errno.EROFS else "look at the disk"
        return f"{said}\nhint: {mend}; what was saved before is whole, the same command goes on"
    least, show = 2.0 * headroom.BYTES, quantities.format_bytes
    if needs is not None:
        free = free_bytes(where)
        said += f", whose disk has {show(free)} free; {needs[1]}"
        least = max(needs[0] - free, least)
    return f"{said}\nhint: make at least {show(least)} of room; the same command then goes on"


def fault_of(error: BaseException | None, folder: Path) -> int | None:
    """The errno of what the disk did, or None where it was something else. Looks at what
    ``error`` came from too, and asks the disk of ``folder`` where a library does not say."""
    # A ValueError is in words for the user already.
    found = None if isinstance(error, ValueError) else error
    unsaid = False
    while found is not None:
        if isinstance(found, OSError) and found.errno in FAULTS:
            return found.errno
        if (number := _OF_SQLITE.get(getattr(found, "sqlite_errorname", ""))) is not None:
            return number
        said = str(found)
        if (told := _ERRNO_IN_WORDS.search(said)) and int(told[1]) in FAULTS:
            return int(told[1])
        unsaid = unsaid or _WRITING_FAILED.search(said) is not None
        found = _before(found)
    return _asked(folder) if unsaid else None


def _before(error: BaseException) -> BaseException | None:
    """What it came from."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _asked(folder: Path) -> int:
    """Why nothing can be written to ``folder``."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            stream.write(os.urandom(2**16))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno in FAULTS:
            return error.errno or errno.EIO
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return errno.EIO


def where_of(error: BaseException, folder: Path) -> Path:
    """The file that an error names, else ``folder``."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and isinstance(found.filename, str):
            return Path(found.filename)
        found = _before(found)
    return folder


def prune(folder: Path) -> int:
    """Delete what was never finished in a run folder, torn checkpoints too; bytes that were."""
    freed = 0
    for path in sorted(folder.rglob("*")):
        if _UNFINISHED.fullmatch(path.name) and not (path / _MANIFEST).is_file():
            with suppress(OSError):
                freed += size_of(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


def size_of(path: Path) -> int:
    """Of a file, or of all files in a folder; 0 where there is none."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def free_bytes(path: Path) -> int:
    """On the disk of a folder or file, which need not be there yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
