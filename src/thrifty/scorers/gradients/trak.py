"""TRAK: influence on the model's output in few random dimensions, over an ensemble (Park et al.
2023, arXiv:2303.14186).

    score(z, target) = mean over i of Q_i(z)  *  mean over i of  mean over v in target of
                       phi_i(v)^T (Phi_i^T Phi_i + lambda)^-1 phi_i(z)
    phi(z) = S grad f(z),   f = log(p / (1 - p)),   p = exp(-L(z)),   Q = 1 - p

i are the checkpoints of a LoRA warm-up, where the paper retrains; Phi holds the rows of a sample of
the pool, S is a count-sketch. Exact, not approximations:

- grad f = -grad L / (1 - p), so that one backward of the loss is enough, and with one checkpoint Q
  cancels against phi(z): rows count by their loss's gradient.
- The mean over the target's rows comes before the inverse, and S^T after it: a row's score is the
  inner product of its whole gradient with a direction, and needs no sketch of its own.
- With fewer rows than dimensions the inverse is that of a matrix of the rows.

The paper's lambda is 0, which takes more rows than dimensions; here it is relative to the mean
eigenvalue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from thrifty.core.contracts import Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.beside import NOTHING
from thrifty.signals.curvature import Sizes, ridge, ridge_flops
from thrifty.signals.influence import Curving, InfluenceScorer, Passes, doubt
from thrifty.signals.warm_up import WarmUp


@dataclass(frozen=True, kw_only=True)
class Trak(InfluenceScorer):
    """Rows that raise the target's likelihood in a linear model of sketched gradients."""

    dimensions: int = 2048
    """Of the sketch."""

    source: ClassVar[str] = "arXiv:2303.14186"
    worth: ClassVar[Worth] = Worth(
        1.5, 1.2, "query likelihood .032 of 8 models, BM25's .062, EK-FAC's .070: bergson 2.5.1"
    )
    every_checkpoint: ClassVar[bool] = True
    of_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, dimensions=(1, inf))

    @property
    def sketch_dimensions(self) -> int:
        return self.dimensions

    def curving(self, sizes: Sizes, num_rows: int, num_targets: int) -> Curving:
        smaller = min(num_rows, self.dimensions)
        return Curving(
            passes=(NOTHING,),
            once=ridge_flops(num_rows, self.dimensions, num_targets),
            held_bytes=12.0 * num_rows * self.dimensions + 16.0 * smaller**2,
        )

    def through_curvature(
        self, warm: WarmUp, towards: Sequence[Any], passes: Passes
    ) -> Sequence[Any]:
        import torch

        features = torch.cat(
            [warm.sketch(each.flat()) / doubt(each)[:, None] for each in next(passes)]
        )
        found = ridge(features, warm.sketch(torch.cat(list(towards), dim=1)), self.damping)
        sizes = [direction.shape[1] for direction in towards]
        return warm.sketch.transposed(found.to(features.dtype)).split(sizes, dim=1)
