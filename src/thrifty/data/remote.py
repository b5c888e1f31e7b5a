"""Files at URLs: read and written again after a fault, and told clearly when that does not help.

s3fs asks up to five times itself, and botocore below it, where a server is busy or a connection
breaks; other file systems give up at once, and none goes on with a file whose server was away for
longer. Here an attempt is one of ``ATTEMPTS``, ever longer apart, and reading goes on at the byte
that it had come to. What asking again cannot mend (no such file, no permission) is raised as it is.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)

T = TypeVar("T")


class Unreachable(ValueError):
    """A URL failed at every attempt."""


def is_url(location: str) -> bool:
    return "://" in location


def shown(location: str) -> str:
    """Without user, password and query: names end up in files and reports."""
    if not is_url(location):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def tried(what: str, url: str, do: Callable[[], T]) -> T:
    """What ``do`` returns, which is called again after a fault. Raises Unreachable in the end."""
    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return do()
        except _LASTING:
            raise
        except Exception as error:  # each file system has its own
            if attempt == ATTEMPTS:
                detail = f"{type(error).__name__}: {error}".splitlines()[0]
                raise Unreachable(
                    f"cannot {what} {shown(url)!r}: {ATTEMPTS} attempts failed, the last with "
                    f"{detail}\nhint: check the network and the server; then the same command again"
                ) from error
        time.sleep(wait)
        wait *= 2
    raise AssertionError("every attempt returns or raises")


class RemoteFile(io.RawIOBase):
    """The bytes at a URL, to be read and sought in; opened anew after a fault."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._at = 0
        self._file: Any = None
        tried("read", url, self._opened)  # a missing file is told at once

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._at
        elif whence == io.SEEK_END:
            offset += tried("read", self._url, lambda: int(self._opened().size))
        self._at = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        data = tried("read", self._url, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            file = self._opened()
            if file.tell() != self._at:
                file.seek(self._at)
            return bytes(file.read(size))
        except Exception:
            self._drop()
            raise

    def _opened(self) -> Any:
        if self._file is None:
            import fsspec

            self._file = fsspec.open(self._url, "rb").open()
        return self._file

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
