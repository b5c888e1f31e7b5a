"""Overlap: rows whose normalised text is in a dev or test set must not be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from thrifty.core.contracts import Candidates, Filter, Held

_CHUNK = 65536


@dataclass(frozen=True, kw_only=True)
class Overlap(Filter):
    """Drop rows that also stand in the dev or test set."""

    source: ClassVar[str] = "decontamination as in arXiv:2005.14165, exact form"

    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        sets = held.fingerprints.items()
        known = np.frombuffer(b"".join(p for _, prints in sets for p in prints), np.uint64)[::2]
        halves = candidates.fingerprints.view(np.uint64)[::2]
        dropped = {}
        for start in range(0, len(halves), _CHUNK):
            # First halves that agree by chance are few.
            for place in start + np.flatnonzero(np.isin(halves[start : start + _CHUNK], known)):
                fingerprint = bytes(candidates.fingerprints[place])
                name = next((name for name, prints in sets if fingerprint in prints), None)
                if name is not None:
                    dropped[int(candidates.ids[place])] = f"also in {name}"
        return dropped
