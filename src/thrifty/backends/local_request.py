"""One request to a model in this process: what of an asking decides what it takes and brings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from thrifty.backends.backend import Asking
from thrifty.costs.token_settings import TokenSettings

MAX_COUNT = 10_000
"""Answers of a request."""
PADDING = 8
"""Prompts of a batch differ by at most one part in so many of a request's tokens."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """An asking that can be answered."""

    asking: Asking
    settings: TokenSettings
    ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def whole(self) -> int:
        """Tokens that it has at most, each of which goes through the model once."""
        return len(self.ids) + self.asking.count * self.max_new_tokens

    @property
    def widest(self) -> int:
        """The most tokens that its prompt may be padded to."""
        return len(self.ids) + self.whole // PADDING

    @property
    def alike(self) -> tuple[TokenSettings, int]:
        """What requests of a batch have in common. With a draft model, rows wait for one another:
        how long others may get is then a part of the cost."""
        return self.settings, self.max_new_tokens if self.settings.draft_model else 0

    def random(self) -> list[Generator]:
        """Of each answer its own; without a seed anybody's guess."""
        count, seed = self.asking.count, self.asking.seed
        if seed is None:
            return [np.random.default_rng() for _ in range(count)]
        tokens = np.array(self.ids, dtype=np.int64).tobytes()
        digest = int.from_bytes(hashlib.sha256(tokens).digest()[:8], "little")
        return [np.random.default_rng([seed % 2**64, digest, place]) for place in range(count)]


def check(asking: Asking) -> None:
    """Raise ValueError where a number of it cannot be."""
    ranges = {
        "count": (1, MAX_COUNT),
        "max_tokens": (1, float("inf")),
        "temperature": (0.0, 100.0),
        "top_p": (1e-9, 1.0),
    }
    for name, (least, most) in ranges.items():
        value = getattr(asking, name)
        if not least <= value <= most:
            raise ValueError(
                f"{name} must be from {least:g} to {most:g}, not {value!r}\nhint: it is a number"
            )
