"""What is kept for later runs: where it cannot be written, that is said once and nothing else."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
"""Another process was first."""


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Write to ``folder``, or leave it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _TAKEN:
            _say_once(folder, os.strerror(error.errno) if error.errno else str(error)[:200])


@cache
def _say_once(folder: Path, reason: str) -> None:
    logging.getLogger(__name__).warning(
        "nothing is kept for later runs: %s cannot be written (%s)", folder, reason
    )
