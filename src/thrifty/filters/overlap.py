"""Overlap: rows whose normalised text is in a dev or test set must not be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Candidates, Filter, Held


@dataclass(frozen=True, kw_only=True)
class Overlap(Filter):
    """Drop rows that also stand in the dev or test set."""

    source: ClassVar[str] = "decontamination as in arXiv:2005.14165, exact form"

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        dropped = {}
        rows = zip(candidates.ids.tolist(), candidates.fingerprints, strict=True)
        for row, fingerprint in rows:
            for name, prints in held.fingerprints.items():
                if bytes(fingerprint) in prints:
                    dropped[row] = f"also in {name}"
                    break
        return dropped
