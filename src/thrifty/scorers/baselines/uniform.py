"""Uniform: a random order of the pool, the baseline that every other scorer has to beat.

The score of a row is a hash of (seed, id), so that it does not depend on shards or their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ordering import random_key
from thrifty.core.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class Uniform(Scorer):
    """A random choice, free of charge: the baseline to beat."""

    seed: int = 0

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued", "preference")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient"]] = "free"
    source: ClassVar[str] = "random choice; 'almost all you need' in arXiv:2410.09335"
    worth: ClassVar[Worth] = Worth(1.0, 0.0, "by definition")

    def __post_init__(self) -> None:
        check_ranges(self, seed=(0, 2**32 - 1))

    def cost(self, work: Work) -> Cost:
        return Cost()

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> None:
        return None

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        key = random_key(shard.ids, self.seed)
        return (key / np.float64(2**64)).astype(np.float32)[:, None]
