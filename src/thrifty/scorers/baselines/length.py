"""Length: long answers first, or those nearest to a length.

A strong and nearly free baseline on instruction pools (arXiv:2402.04833 "Long is more for
alignment"; arXiv:2410.09335). It says nothing of what the answer is worth.
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


@dataclass(frozen=True, kw_only=True)
class Length(Scorer):
    """Long answers first (or those nearest to ``near`` tokens)."""

    near: int | None = None
    """Prefer answers of about so many tokens; None: the longer the better."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued", "preference")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient"]] = "free"
    source: ClassVar[str] = "arXiv:2402.04833"
    worth: ClassVar[Worth] = Worth(
        1.0,
        0.5,
        "43.5 against 42.2 (10k of 200k) and 17.8 against 41.1 (of 5.8M), arXiv:2503.01807",
    )

    def __post_init__(self) -> None:
        check_ranges(self, near=(1, inf))

    def cost(self, work: Work) -> Cost:
        return Cost()

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> None:
        return None

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        tokens = np.array([int(t.loss_mask.sum()) for t in shard.tokens], dtype=np.float32)
        return (tokens if self.near is None else -np.abs(tokens - self.near))[:, None]
