"""In which order files are synced and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def recorded(patch: pytest.MonkeyPatch, home: Path) -> list[tuple[str, str]]:
    """Whatever is synced or named from now on, below ``home``: ("sync", path), ("name", path). The
    disk itself is not asked to: that takes no time."""
    events: list[tuple[str, str]] = []
    plain_replace = os.replace

    def relative(path: os.PathLike[str]) -> str:
        return Path(path).relative_to(home).as_posix()

    def sync(descriptor: int) -> None:
        events.append(("sync", relative(Path(f"/proc/self/fd/{descriptor}").readlink())))

    def replace(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        plain_replace(source, target)
        events.append(("name", relative(target)))

    patch.setattr(os, "fsync", sync)
    patch.setattr(os, "replace", replace)
    return events
