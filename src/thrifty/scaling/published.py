"""Laws that papers give, to plan by before there are runs of one's own.

They hold for their data, tokenizer, architecture and way to count parameters; a fit of one's own
runs is worth more. None comes with draws, so that no interval can be told from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thrifty.core.typed import nearest
from thrifty.scaling.laws import Law


@dataclass(frozen=True)
class Published:
    law: Law
    source: str


PUBLISHED = {
    "besiroglu": Published(
        Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "arXiv:2404.10102, Chinchilla's points fitted anew",
    ),
    "hoffmann": Published(
        Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
        "arXiv:2203.15556, Chinchilla as printed",
    ),
    "sardana": Published(
        Law(E=1.69, A=406.4, B=410.7, alpha=0.336, beta=0.283),
        "arXiv:2401.00448, Chinchilla with a third digit of its exponents",
    ),
    "muennighoff": Published(
        Law(
            E=math.exp(0.6254804),
            A=math.exp(6.255414),
            B=math.exp(7.3049974),
            alpha=0.3526596,
            beta=0.3526596,
            R_D=15.387756,
            R_N=5.309743,
        ),
        "arXiv:2305.16264, C4, with repeated tokens",
    ),
}
DEFAULT = "besiroglu"
REPEATS = "muennighoff"


def published(name: str) -> Published:
    """Raises ValueError for a name that is none of theirs."""
    if name not in PUBLISHED:
        raise ValueError(
            f"{name!r} is neither a file nor a published law\n"
            f"hint: {nearest(name, PUBLISHED)}; or a file that `thrifty law fit -o` left"
        )
    return PUBLISHED[name]


def with_repeats(law: Law) -> tuple[Law, str]:
    """A law that says what repeated tokens are worth: itself where it knows, otherwise with the
    published R_D and R_N, and from where."""
    if np.all(np.isfinite(law.R_D)):
        return law, ""
    other: Any = PUBLISHED[REPEATS]
    return replace(law, R_D=other.law.R_D, R_N=other.law.R_N), other.source
