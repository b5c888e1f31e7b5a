"""Superfiltering: instruction-following difficulty as a small model sees it (arXiv:2402.00530).

    score = IFD under ``model`` (GPT-2 in the paper)

Small and large models agree on the order of difficulties, though not on their size, so that a
twentieth of the cost buys the same choice. Name the small one: ``{superfiltering: {model: gpt2}}``;
without a name it is ``ifd`` under the model to be trained.
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
class Superfiltering(Scorer):
    """Instruction-following difficulty as a smaller model sees it, at its price."""

    model: str = ""
    """Folder or hub name of the smaller model; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft",)
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "arXiv:2402.00530"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "5% of Alpaca is ahead of it all, arXiv:2402.00530; IFD loses in 2503.01807"
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
