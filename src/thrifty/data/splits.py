"""Parts of a set of rows, by the hash of what each row says.

A row's part depends on its fingerprint and the seed alone: not on its place, on other rows or on
how many there are. Rows that say the same (case and white space aside) fall on the same side, so
that no copy of a development row is ever trained on. The shares hold in expectation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping

from thrifty.data.pool import BadRow, Row


def part_of(fingerprint: bytes, fractions: Mapping[str, float], seed: int) -> str:
    """The name of the part, of ``fractions``, that a row with this fingerprint belongs to."""
    if (
        not fractions
        or min(fractions.values()) < 0
        or not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-9)
    ):
        raise ValueError(
            f"the fractions of a split must sum to 1, not {dict(fractions)}\n"
            "hint: for example {'train': 0.9, 'dev': 0.1}"
        )
    key = seed.to_bytes(16, "little", signed=True)
    digest = hashlib.blake2b(fingerprint, digest_size=8, key=key).digest()
    place, reached = int.from_bytes(digest, "little") / 2**64, 0.0
    for name, fraction in fractions.items():
        reached += fraction
        if place < reached:
            return name
    return [name for name, fraction in fractions.items() if fraction > 0][-1]


def split_rows(
    rows: Iterable[Row | BadRow], fractions: Mapping[str, float], seed: int = 0
) -> Iterator[tuple[str, Row]]:
    """(part, row) for every valid row, in order; bad rows belong to no part."""
    for row in rows:
        if isinstance(row, Row):
            yield part_of(row.fingerprint, fractions, seed), row
