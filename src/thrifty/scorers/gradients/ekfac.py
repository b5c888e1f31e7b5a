"""EK-FAC influence: the target's gradient through the inverse of a Kronecker-factored Fisher
(Grosse et al. 2023, arXiv:2308.03296).

    score(z, target) = < g(z), (F + lambda)^-1 mean over v in target of g(v) >
    F = (Q_l x Q_r) diag(values) (Q_l x Q_r)^T  of each weight alone,   lambda = 0.1 mean(values)

over the adapter of a LoRA warm-up, at its end. The eigenvectors are those of the inputs' and of the
output gradients' second moments, the values the mean squared gradients along them; without
``corrected`` the values of K-FAC, one pass fewer. ``signals/curvature.py`` says what is assumed.
Scores of different weights are in one unit, up to one factor for all.

Limit: it holds a square matrix for each side of each linear, in float64; a small ``model`` keeps
them small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from thrifty.core.contracts import Worth
from thrifty.signals.beside import Beside
from thrifty.signals.curvature import (
    Sizes,
    eigenvectors_flops,
    ekfac,
    kfac,
    num_elements,
    sides_elements,
    solved,
    turning_flops,
)
from thrifty.signals.influence import Curving, InfluenceScorer, Passes
from thrifty.signals.warm_up import WarmUp


@dataclass(frozen=True, kw_only=True)
class Ekfac(InfluenceScorer):
    """Rows whose gradient helps the target's through the inverse of an EK-FAC Fisher."""

    corrected: bool = True
    """Eigenvalues measured in the eigenbasis; False: K-FAC's products, one pass fewer."""

    source: ClassVar[str] = "arXiv:2308.03296"
    worth: ClassVar[Worth] = Worth(
        2.5, 1.5, "query likelihood .070, BM25's .062, gradient cosine's .021: bergson 2.5.1"
    )

    def curving(self, sizes: Sizes, num_rows: int, num_targets: int) -> Curving:
        moments = Beside(per_token=2.0 * (sides_elements(sizes) - num_elements(sizes)))
        turned = Beside(per_example=turning_flops(sizes))
        return Curving(
            passes=(moments, turned) if self.corrected else (moments,),
            once=eigenvectors_flops(sizes) + 2 * num_targets * turning_flops(sizes),
            held_bytes=8.0 * sides_elements(sizes) + 16.0 * num_elements(sizes),
        )

    def through_curvature(
        self, warm: WarmUp, towards: Sequence[Any], passes: Passes
    ) -> Sequence[Any]:
        bases = kfac(warm.weights, next(passes))
        if self.corrected:
            bases = ekfac(bases, next(passes))
        return solved(bases, towards, self.damping)
