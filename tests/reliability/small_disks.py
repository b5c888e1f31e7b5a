"""Disks of a few MiB, and their failing: mounts of tmpfs, or of ext4 in a file, which need root."""

from __future__ import annotations

import contextlib
import os
import shutil
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


@contextlib.contextmanager
def ext4_disk(folder: Path, image: Path, mib: int) -> Iterator[Path]:
    """One that turns read-only at an error, as most servers' do; the test is skipped where none can
    be mounted."""
    if os.name != "posix" or os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("a disk of ext4 takes root and mkfs")
    with image.open("wb") as file:
        file.truncate(mib * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if not mounted(folder, "-o", "loop,errors=remount-ro", str(image)):
        pytest.skip("a file cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


def break_ext4(disk: Path) -> None:
    """Have the kernel find an error in it: read-only from now on, whoever has a file open. The test
    is skipped where the kernel cannot be asked to."""
    found = subprocess.run(["findmnt", "-n", "-o", "SOURCE", disk], capture_output=True, text=True)
    trigger = Path("/sys/fs/ext4", Path(found.stdout.strip()).name, "trigger_fs_error")
    if not trigger.exists():
        pytest.skip("the kernel breaks no file system when asked to")
    trigger.write_text("injected")


def mend_ext4(disk: Path, image: Path) -> None:
    """As one does: unmount it, which nobody may use any more, check it, mount it again."""
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["e2fsck", "-fy", image], capture_output=True, check=False)
    assert mounted(disk, "-o", "loop,errors=remount-ro", str(image))
