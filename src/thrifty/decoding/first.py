"""First: one sample, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.sampling import Action, Asked, Draw, Means, vote


@dataclass(frozen=True, kw_only=True)
class First(DecodingPolicy):
    """One sample, and its answer, whatever it is."""

    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "the usual baseline"
    needs: ClassVar = "nothing"

    def decide(self, asked: Asked, means: Means) -> Action:
        if asked.num_drawn:
            return vote(asked, "one sample, as asked")
        return Draw(model=self.model or means.offers[0].model)
