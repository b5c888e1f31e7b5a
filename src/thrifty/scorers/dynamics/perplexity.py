"""Perplexity: the answer's loss given its prompt, under the base model.

    L(y | x) = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t          (m = loss mask), nats a token

``band`` says which end of the pool to keep. Middle is the usual advice for instruction data, low
for noisy pools, high for pools of known quality (arXiv:2309.04564, arXiv:2405.20541); which is
right depends on pool and budget, so it is a knob and its prior is wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.forward import example_losses, scoring_cost
from thrifty.signals.some_rows import drawn

_SAMPLE_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Perplexity(Scorer):
    """The answer's loss under the base model: keep the low, middle or high band."""

    band: Literal["low", "middle", "high"] = "middle"
    center: float = 0.5
    """Where the middle band lies, as a quantile of the pool's losses."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient"]] = "forward"
    source: ClassVar[str] = "arXiv:2309.04564; as a selector under a budget arXiv:2410.16208"
    worth: ClassVar[Worth] = Worth(
        1.3, 1.0, "3 to 9 times random at 5% in arXiv:2410.16208, below random in arXiv:2503.01807"
    )

    def __post_init__(self) -> None:
        check_ranges(self, center=(0, 1))

    def cost(self, work: Work) -> Cost:
        scoring = scoring_cost(work, work.pool)
        if self.band == "middle":  # the quantile is read off a sample first
            sample = min(1.0, _SAMPLE_ROWS / max(work.pool.num_examples, 1))
            scoring += scoring_cost(work, work.pool.part(sample))
        return scoring

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[Any, Any, float]:
        """The model and, for the middle band, the pool's loss at ``center``, from some of its
        rows."""
        model, shape = models.base(), models.shape
        center = float("nan")
        if self.band == "middle":
            sample = drawn(pool, _SAMPLE_ROWS, 0)
            tokens = [each for shard in sample.shards() for each in shard.tokens]
            losses = example_losses(model, shape, tokens, meter).mean
            center = float(np.quantile(losses, self.center))
        return model, shape, center

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        model, shape, center = state
        loss = example_losses(model, shape, shard.tokens, meter).mean
        score = {"low": -loss, "high": loss, "middle": -np.abs(loss - center)}[self.band]
        return score.astype(np.float32)[:, None]
