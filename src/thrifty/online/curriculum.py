"""From one end of the rows' difficulty to all of them (Bengio et al. 2009; competence-based
pacing: Platanios et al., arXiv:1903.09848; when it helps: arXiv:2012.03107).

Rows are sorted by difficulty; at the share s of the run the first c(s) of them are exposed,

    linear    c = c0 + (1 - c0) s / r
    root      c = sqrt(c0^2 + (1 - c0^2) s / r)        (competence)
    step      c = c0 + (1 - c0) floor(4 s / r) / 4

and all from s = r on. Of the exposed the rows that were drawn least often come next, ties at
random, so that a curriculum without a ramp is passes in random order; the paper draws uniformly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import (
    Chosen,
    Meter,
    Models,
    OnlineMethod,
    Progress,
    Round,
    Rows,
    Work,
)
from thrifty.core.ranges import check_ranges
from thrifty.signals.forward import example_losses, scoring_cost


@dataclass(frozen=True, kw_only=True)
class Curriculum(OnlineMethod):
    """From easy rows to all, or from hard ones, or from the middle."""

    first: Literal["easy", "hard", "middle"] = "easy"
    by: Literal["loss", "length", "score"] = "loss"
    """Difficulty: the base model's loss (a forward pass over the chosen rows), the tokens, or the
    scorer's score, the lowest the easiest."""
    pacing: Literal["linear", "root", "step"] = "root"
    start: float = 0.2
    """c0, the share of the rows exposed at first."""
    ramp: float = 0.5
    """r, the share of the run after which all are."""

    source: ClassVar[str] = "arXiv:1903.09848"
    cost_class: ClassVar[Literal["free", "forward"]] = "forward"

    def __post_init__(self) -> None:
        check_ranges(self, start=(0, 1), ramp=(0, 1))

    def cost(self, work: Work) -> Cost:
        return scoring_cost(work, work.pool) if self.by == "loss" else Cost()

    def prepare(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        if self.by == "length":
            difficulty = chosen.num_tokens.astype(np.float64)
        elif self.by == "score":
            difficulty = chosen.scores.astype(np.float64)
        else:
            difficulty = example_losses(models.base(), models.shape, chosen.tokens, meter).mean
        known = difficulty[np.isfinite(difficulty)]
        middle = float(np.median(known)) if len(known) else 0.0
        difficulty = np.where(np.isnan(difficulty), middle, difficulty)
        if self.first == "middle":
            difficulty = np.abs(difficulty - middle)
        elif self.first == "hard":
            difficulty = -difficulty
        return {"order": np.argsort(difficulty, kind="stable")}

    def exposed(self, share: float) -> float:
        """c(s)."""
        if share >= self.ramp:
            return 1.0
        way, start = share / self.ramp, self.start
        if self.pacing == "root":
            return math.sqrt(start**2 + (1 - start**2) * way)
        if self.pacing == "step":
            way = math.floor(4 * way) / 4
        return start + (1 - start) * way

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        most = max(1, math.ceil(self.exposed(now.share) * len(chosen)))
        return Round(rows=now.least_drawn(known["order"][:most], chosen.num_tokens))
