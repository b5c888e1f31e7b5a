"""Head gradient: rows whose gradient at the output head points where the target's does.

    score(z, target) = mean over v in target of cos( G(z), G(v) ),    G = sum_t e_t h_t^T

e_t is what the model predicts less what is there, h_t the last hidden state: the last-layer
gradient of BADGE (arXiv:1906.03671), with the true tokens for its guessed ones, where RDS+
(arXiv:2503.01807) looks at h alone. No backward: the target's mean direction is formed once, as
large as the head; a row's own gradient never is (``signals/head_gradients.py``), and its norm comes
from products of tokens with tokens. Exact, so that no sketch is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.head_gradients import HeadGradients, each_head, head_gradients_cost


@dataclass(frozen=True, kw_only=True)
class RDSGrad(Scorer):
    """Cosine of rows' gradients at the output head with the target's; no backward."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""
    max_target_rows: int = 128
    """Target rows whose gradients are averaged, the first so many."""

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"
    source: ClassVar[str] = "BADGE's gradient, arXiv:1906.03671; beside RDS+, arXiv:2503.01807"
    worth: ClassVar[Worth] = Worth(
        2.0, 1.5, "a part of LESS's gradient at one checkpoint; no published number on text"
    )

    def __post_init__(self) -> None:
        check_ranges(self, max_target_rows=(1, inf))

    def cost(self, work: Work) -> Cost:
        total = head_gradients_cost(work, work.pool, len(work.targets), self.model)
        for target in work.targets.values():
            shown = target.part(min(1.0, self.max_target_rows / max(target.num_examples, 1)))
            total += head_gradients_cost(work, shown, 1, self.model)
        return total

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Models, Any]:
        """The model, and the mean of each target's unit gradients [num_targets, vocab, width]."""
        import torch

        own = models.other(self.model)
        directions = []
        for target in targets.values():
            shown = own.tokens(target)[: self.max_target_rows]
            parts: list[Any] = []

            def add(places: list[int], gradients: HeadGradients, parts: list[Any] = parts) -> None:
                lengths = gradients.squared_norms().sqrt().clamp_min(1e-30)
                found = gradients.weighed_sum(1 / lengths)
                parts[:] = [parts[0] + found if parts else found]

            each_head(own.base(), own.shape, shown, meter, add, passes=1)
            directions.append(parts[0] / len(shown))
        return own, torch.stack(directions)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        own, directions = state
        found = np.zeros((len(shard), len(directions)), dtype=np.float32)

        def visit(places: list[int], gradients: HeadGradients) -> None:
            lengths = gradients.squared_norms().sqrt().clamp_min(1e-30)
            cosines = gradients.products(directions) / lengths[:, None]
            found[places] = cosines.float().cpu().numpy()

        passes = len(directions)
        each_head(own.base(), own.shape, own.tokens(shard), meter, visit, passes=passes)
        return found
