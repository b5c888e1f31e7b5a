"""What a plan that was killed had tokenised, for the next plan of the same rows.

    progress.jsonl    the key of what is built, then a line for each shard that is whole: its file,
                      rows and hash; gone once the store is finished

The key (``store_cache.py``) decides all that a store holds, so that rows under the same one are the
same rows; they are read again, in their order, and not tokenised again. A torn last line, or a
shard that is not as it was written, ends what is taken over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from thrifty.data.shard import Shard, ShardFile
from thrifty.data.tokens import Tokens

PROGRESS = "progress.jsonl"


class Progress:
    """Of a store that is being built in ``folder``; nothing is noted without a ``key``."""

    def __init__(self, folder: Path, key: str | None) -> None:
        self._file = folder / PROGRESS
        self._noting = key is not None
        if self._noting:
            self._note({"key": key})

    def add(self, shard: ShardFile) -> None:
        if self._noting:
            self._note(asdict(shard))

    def done(self) -> None:
        self._file.unlink(missing_ok=True)

    def _note(self, values: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Known(NamedTuple):
    """A row that is tokenised."""

    id: int
    fingerprint: bytes
    tokens: Tokens


def set_aside(folder: Path, aside: Path) -> None:
    """Move what a killed plan left in ``folder`` to ``aside``, unless more of the same lies there
    already."""
    new, old = _lines(folder), _lines(aside)
    if new and (len(new) > len(old) or new[0] != old[0]):
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def known_rows(folder: Path | None, key: str | None) -> Iterator[Known]:
    """Of what was left in ``folder``, in the order of the rows; nothing where it is of another
    ``key``."""
    for each in _shards(folder, key):
        assert folder is not None
        try:
            file = ShardFile(**each)
            shard = Shard(folder / file.name, file.sha256)
            rows = list(zip(shard.ids.tolist(), shard.fingerprints, shard.tokens, strict=True))
        except (OSError, TypeError, ValueError):
            return
        yield from (Known(*row) for row in rows)


def num_known(folder: Path | None, key: str | None) -> int:
    """How many rows those are, as far as the notes go."""
    return sum(int(each.get("num_rows", 0)) for each in _shards(folder, key))


def _shards(folder: Path | None, key: str | None) -> list[dict[str, Any]]:
    """As they were noted; none where they are of another key."""
    first, *shards = (_lines(folder) if folder and key else []) or [{}]
    return shards if first.get("key") == key else []


def _lines(folder: Path) -> list[dict[str, Any]]:
    found = []
    try:
        for line in (folder / PROGRESS).read_text(encoding="utf-8").splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):  # none, or the last one is torn
        pass
    return found
