"""Memorisation: which share of the answer the model would have written itself.

    score = - mean over t of [ argmax p(. | z_<t) = z_t ]

The teacher-forced form of the share of a suffix that greedy decoding reproduces (arXiv:2304.11158,
as a pruning score arXiv:2309.04564): one pass instead of a generation, and an upper bound of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.signals.forward import scoring_cost, token_statistics


@dataclass(frozen=True, kw_only=True)
class Memorization(Scorer):
    """How little of the answer the model would have written itself."""

    keep: Literal["new", "known"] = "new"

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "arXiv:2304.11158; as a score arXiv:2309.04564"
    worth: ClassVar[Worth] = Worth(
        1.0, 0.8, "near random as a pruning score of pretraining data, arXiv:2309.04564"
    )

    def cost(self, work: Work) -> Cost:
        return scoring_cost(work, work.pool, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        examples = state.tokens(shard)
        found = token_statistics(state.base(), state.shape, examples, meter, _known)
        sign = -1.0 if self.keep == "new" else 1.0
        return (sign * found.mean).astype(np.float32)[:, None]


def _known(nll: Any, logits: Any, ids: Any) -> Any:
    """[batch, sequence - 1]"""
    return logits.argmax(-1) == ids
