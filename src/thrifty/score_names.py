"""What a folder of scores is called: a hash of all that they depend on, so that equal work is never
paid for twice, and no other scores are taken for them.

That is the method with its options, the rows that these name and its code; the pool's rows as they
were read and split; and, where it asks for them, the targets' rows in the targets' order, the
models that it looks at with what they are read by, and the dtype they are read in.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from thrifty import score_cache, scorers, signals
from thrifty.core import ordering
from thrifty.core.contracts import Scorer
from thrifty.core.resolve import name_of
from thrifty.data.pool import Row, read_rows
from thrifty.data.store import StoreManifest


@dataclass(frozen=True, kw_only=True)
class ScoreNames:
    """For the targets of one run."""

    signals: Mapping[str, StoreManifest]
    """The targets' rows."""
    model: Callable[[str], str]
    """Path of a model, empty for the one to be trained -> a hash of it."""

    def of(self, scorer: Scorer, pool: StoreManifest, dtype: str) -> str:
        """``dtype``: in which models are read."""
        looks = scorer.needs_model or bool(scorer.model)
        options: Any = scorer  # every method is a dataclass
        # Scores of targets are columns: which is whose is a matter of their order.
        asked = self.signals.items() if scorer.needs_target else ()
        parts = [
            [name_of(scorer), asdict(options)],
            [_texts(path) for path in scorer.reads],
            _code(type(scorer)),
            _rows(pool),
            [[name, _rows(rows)] for name, rows in asked],
            [self.model(path) for path in scorer.looks_at] if looks else None,
            dtype if looks else None,
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return f"{name_of(scorer)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def are_kept(self, scorer: Scorer, pool: StoreManifest, dtype: str) -> bool:
        """Whether an earlier run left these scores. Nothing is hashed where it left none of the
        method, since weights may be large."""
        if not score_cache.has(f"{name_of(scorer)}-*"):
            return False
        try:
            return score_cache.has(self.of(scorer, pool, dtype))
        except ValueError:  # of a model whose weights are not here yet
            return False


def _rows(store: StoreManifest) -> list[Any]:
    held = store.content_sha256 or [shard.sha256 for shard in store.shards]  # of an older store
    return [held, store.tokenizer_fingerprint, store.max_length]


def _texts(path: str) -> str:
    digest = hashlib.sha256()
    for row in read_rows((path,)):
        if isinstance(row, Row):
            digest.update(row.text.encode(errors="replace") + b"\0")
    return digest.hexdigest()


@cache
def _code(method: type[Scorer]) -> str:
    """Of the method's file, of all scorers, since some are made of others, of the signals, and of
    how rows are ordered: a mended scorer scores anew."""
    files = [
        Path(inspect.getfile(method)),
        Path(ordering.__file__),
        *sorted(Path(scorers.__file__).parent.rglob("*.py")),
        *sorted(Path(signals.__file__).parent.glob("*.py")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
