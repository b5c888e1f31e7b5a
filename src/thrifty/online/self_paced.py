"""Rows that the model itself finds easy so far (self-paced learning, Kumar et al. 2010).

    v_i = 1 if L_i <= lambda else 0,    lambda growing

L_i is the row's loss as training last saw it; before that the base model's, from one forward
pass over the chosen rows. lambda is the quantile of all L at c0 + (1 - c0) s / r, where s is the
share of the run that is over; from s = r on every row is in. Of the rows that are in, those drawn
least often come next. What the rows above lambda would have taken of a round is saved.
"""

from __future__ import annotations

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
class SelfPaced(OnlineMethod):
    """Rows whose loss is below a growing bound; losses as training last saw them."""

    start: float = 0.5
    """c0, the share of the rows below the bound at first."""
    ramp: float = 0.7
    """r, the share of the run after which all are."""

    source: ClassVar[str] = "Kumar, Packer, Koller 2010, Self-Paced Learning"
    cost_class: ClassVar[Literal["free", "forward"]] = "forward"
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, start=(0, 1), ramp=(0, 1))

    def cost(self, work: Work) -> Cost:
        return scoring_cost(work, work.pool)

    def prepare(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        losses = example_losses(models.base(), models.shape, chosen.tokens, meter).mean
        return {"losses": np.nan_to_num(losses, nan=np.inf)}  # no token to learn: never easy

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        losses = np.where(np.isnan(now.losses), known["losses"], now.losses)
        way = min(1.0, now.share / self.ramp) if self.ramp else 1.0
        most = max(1, round((self.start + (1 - self.start) * way) * len(losses)))
        bound = np.partition(losses, most - 1)[most - 1]
        easy = np.flatnonzero(losses <= bound)
        rows = now.least_drawn(easy, chosen.num_tokens)
        share_in = chosen.num_tokens[easy].sum() / chosen.num_tokens.sum()
        given = chosen.num_tokens[rows].sum()
        return Round(rows=rows, left_out=round(given * (1 / share_in - 1)))
