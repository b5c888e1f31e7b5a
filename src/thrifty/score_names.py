"""What a folder of scores is called: a hash of all that they depend on, so that equal work is never
paid for twice, and no other scores are taken for them.

That is the method with its options and its code, the rows and how they were split, and, where it
asks for them, the target's rows, the weights that it looks at and the dtype they are read in.
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
from thrifty.core.contracts import Rows, Scorer
from thrifty.core.resolve import name_of
from thrifty.data.store import StoreManifest


@dataclass(frozen=True, kw_only=True)
class ScoreNames:
    """For the rows of one run."""

    pool: StoreManifest
    signals: Callable[[], Mapping[str, Rows]]
    """The targets' rows."""
    weights: Callable[[str], str]
    """Path of a model, empty for the one to be trained -> a hash of its weights."""

    def of(self, scorer: Scorer, dtype: str) -> str:
        """``dtype``: in which models are read."""
        asked = self.signals() if scorer.needs_target else {}
        looks = scorer.needs_model or bool(scorer.model)
        options: Any = scorer  # every method is a dataclass
        parts = [
            [name_of(scorer), asdict(options)],
            _code(type(scorer)),
            self.pool.fingerprint,
            [self.pool.tokenizer_fingerprint, self.pool.max_length],
            [self.weights(path) for path in scorer.looks_at] if looks else None,
            {name: b"".join(map(bytes, rows.fingerprints)).hex() for name, rows in asked.items()},
            dtype if looks else None,
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return f"{name_of(scorer)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def are_kept(self, scorer: Scorer, dtype: str) -> bool:
        """Whether an earlier run left these scores. Nothing is hashed where it left none of the
        method, since weights may be large."""
        if not score_cache.has(f"{name_of(scorer)}-*"):
            return False
        try:
            return score_cache.has(self.of(scorer, dtype))
        except ValueError:  # of a model whose weights are not here yet
            return False


@cache
def _code(method: type[Scorer]) -> str:
    """Of the method's file, of all scorers, since some are made of others, and of the signals: a
    mended scorer scores anew."""
    files = [
        Path(inspect.getfile(method)),
        *sorted(Path(scorers.__file__).parent.rglob("*.py")),
        *sorted(Path(signals.__file__).parent.glob("*.py")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
