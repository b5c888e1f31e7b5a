"""Finished scores kept for other runs: what was paid for once is not paid for again.

    CACHE/scores/NAME-HASH/shard-00000.parquet ...  cost.json

Named by ``score_names.py`` after all that scores depend on. ``cost.json`` says what they cost and
where they came from, so that a run that takes them over can say so. Entries appear by a rename,
whole, and are checked against their hashes on the way out. They are small, 4 bytes a row and
target; ``THRIFTY_ROWS_CACHE_GIB=0`` switches this off too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from thrifty.core import sums
from thrifty.core.best_effort import keeping
from thrifty.core.durable import rename_durably
from thrifty.costs.hardware import cache_folder
from thrifty.data.store_cache import most_bytes

COST = "cost.json"


def has(name: str) -> bool:
    """Whether there are scores of that name, which may be a pattern."""
    return most_bytes() > 0 and any((cache_folder() / "scores").glob(f"{name}/{COST}"))


def fetch(folder: Path) -> dict[str, Any] | None:
    """Copy the scores of ``folder``'s name to it; what they cost, or None where there are none."""
    entry = cache_folder() / "scores" / folder.name
    if not has(folder.name):
        return None
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shutil.copytree(entry, draft)
        if any(sums.faults(draft)):
            shutil.rmtree(entry, ignore_errors=True)
            raise ValueError
        found: dict[str, Any] = json.loads((draft / COST).read_text(encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)
        rename_durably(draft, folder)
    except (OSError, ValueError):  # taken away half-way, or damaged
        shutil.rmtree(draft, ignore_errors=True)
        return None
    return found


def keep(folder: Path, cost: dict[str, Any]) -> None:
    """Note what the finished scores in ``folder`` cost, and keep a copy of both, if possible."""
    sums.write(folder / COST, json.dumps(cost))
    if most_bytes() == 0:
        return
    home = cache_folder() / "scores"
    draft = home / f".{folder.name}.{uuid4().hex}"
    try:
        with keeping(home):
            home.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, draft)
            rename_durably(draft, home / folder.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
