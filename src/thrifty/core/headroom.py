"""Room on the disk for a ledger's last words: what was spent, and why a run stopped.

    ledger.headroom    bytes of no meaning, beside a ledger while it is open for spending

A full disk takes no transaction. Just before one that must not fail the file is let go, once the
disk has less left than a transaction may take, and so there is room for the next few.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BYTES = 512 * 1024
"""Of the file: a settlement takes 20 to 40 KiB of SQLite's write-ahead log, and a few of them and
the memory shared beside it are all that follows a fault."""
_SHARED_BYTES = 64 * 1024
"""More than the memory that SQLite shares among those who have a ledger open."""
_LEAST_FREE = 128 * 1024
"""With less the file is let go."""


class Headroom:
    """Beside the ledger at ``path``."""

    def __init__(self, path: Path) -> None:
        self._ledger = path
        self._file = path.with_name(f"{path.stem}.headroom")
        self._held = False

    def hold(self) -> None:
        """Raises OSError where the disk has no room for it, before anything is spent."""
        self._held = True
        try:
            if self._file.is_file() and self._file.stat().st_size == BYTES:
                return  # a process that was killed left it
            # Not zeros, which some file systems make nothing of.
            self._file.write_bytes(os.urandom(BYTES))
        except OSError as error:
            self.release()
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._file)) from error

    def check(self) -> None:
        """For who reads: raises OSError where SQLite has no room for the memory that it shares with
        who writes, since it would call that damage."""
        folder, shared = self._file.parent, self._ledger.with_name(f"{self._ledger.name}-shm")
        if shared.exists() or not os.access(folder, os.W_OK):
            return  # it is there, or does without
        if shutil.disk_usage(folder).free < _SHARED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._ledger))

    @contextmanager
    def for_last_words(self) -> Iterator[None]:
        """A transaction that must not fail for want of room."""
        if shutil.disk_usage(self._file.parent).free < _LEAST_FREE:
            self.release()
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.release()  # there was less than the disk said: then for the next
            raise

    def release(self) -> None:
        """Of this process's own: who only reads a ledger takes nothing from who spends."""
        if self._held:
            self._held = False
            with suppress(OSError):
                self._file.unlink()
