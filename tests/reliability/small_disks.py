"""Disks of a few MiB, and their failing: tmpfs mounts, which need root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BALLAST = "ballast"


def mounted(folder: Path, *options: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", *options, str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at ``folder``; the test is skipped where none can be mounted."""
    if (
        os.name != "posix"
        or os.geteuid()
        or not mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    ):
        pytest.skip("a small disk takes root and mount")
    try:
        yield folder
    finally:
        # Lazily: whoever still has a file of it open ends before the next test's disk is made.
        subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Write a file until but ``leave`` bytes are free."""
    with (disk / BALLAST).open("ab") as file, contextlib.suppress(OSError):
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave) > 0:
            file.write(bytes(min(free, 2**20)))
            file.flush()


def empty(disk: Path) -> None:
    (disk / BALLAST).unlink(missing_ok=True)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def writable(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
