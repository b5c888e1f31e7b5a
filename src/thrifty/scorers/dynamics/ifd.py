"""Instruction-following difficulty: how little the prompt helps with the answer (arXiv:2308.12032).

    score = IFD = exp( L(y | x) - L(y) )      where it is below 1, else -IFD

High = hard to follow, hence instructive; 1 and more = the answer does not fit its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.signals.conditional import difficulty_cost, instruction_following_difficulty


@dataclass(frozen=True, kw_only=True)
class IFD(Scorer):
    """How little the prompt helps with the answer, of pairs where it helps at all."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft",)
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "arXiv:2308.12032"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "a tenth of Alpaca is level with it all, arXiv:2308.12032; loses in 2503.01807"
    )

    def cost(self, work: Work) -> Cost:
        return difficulty_cost(work, work.pool, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        found = instruction_following_difficulty(state, shard, meter)
        # From 1 on the prompt does not help: such a pair is no answer to it, and comes last.
        return np.where(found < 1, found, -found).astype(np.float32)[:, None]
