"""Dev loss: nats a token of the dev rows' answers; the default.

    L = sum of -log p(token | what is before it) / tokens

Less is better. Nothing is generated: one forward pass over the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Metric


@dataclass(frozen=True, kw_only=True)
class DevLoss(Metric):
    """Nats a token of the rows' own answers (on pairs: a pair); nothing is generated."""

    source: ClassVar[str] = "cross-entropy"

    @property
    def unit(self) -> str:
        return "nats/token"
