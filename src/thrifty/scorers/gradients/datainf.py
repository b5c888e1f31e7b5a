"""DataInf: influence with an inverse in closed form, a weight at a time (Kwon et al. 2023,
arXiv:2310.00902).

    score(z, target) = < g(z), P mean over v in target of g(v) >
    P v = 1 / (n lambda)  sum over i of  (v - g_i <g_i, v> / (lambda + |g_i|^2))
    lambda = 0.1 mean over i of |g_i|^2 / elements

of each matrix of the adapter alone: the mean of inverses of rank-one matrices where the inverse of
their mean is meant, which is near for few elements, as LoRA's are. The i are rows of the pool; the
gradients are those at the end of a LoRA warm-up. The first of two passes over them finds the
norms, lambda and the <g_i, v>, the second the sum, so that no gradient is stored. All scores are up
to one factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from thrifty.core.contracts import Worth
from thrifty.signals.beside import Beside
from thrifty.signals.curvature import Sizes, num_elements, unit
from thrifty.signals.influence import Curving, InfluenceScorer, Passes
from thrifty.signals.warm_up import WarmUp


@dataclass(frozen=True, kw_only=True)
class Datainf(InfluenceScorer):
    """Rows whose gradient helps the target's through a closed-form inverse of the curvature."""

    source: ClassVar[str] = "arXiv:2310.00902"
    worth: ClassVar[Worth] = Worth(
        2.0, 1.5, "nearer exact influence than TracIn's products on LoRA, arXiv:2310.00902"
    )

    def curving(self, sizes: Sizes, num_rows: int, num_targets: int) -> Curving:
        products = Beside(per_example=2.0 * num_targets * num_elements(sizes))
        return Curving(
            passes=(products, products),
            once=0.0,
            held_bytes=4.0 * (num_targets + 1) * (num_rows * len(sizes) + num_elements(sizes)),
        )

    def through_curvature(
        self, warm: WarmUp, towards: Sequence[Any], passes: Passes
    ) -> Sequence[Any]:
        import torch

        norms, along = [], []  # of each batch [batch, weights], [batch, weights, targets]
        for gradients in next(passes):
            norms.append(towards[0].new_zeros(len(gradients), len(towards)))
            along.append(towards[0].new_zeros(len(gradients), len(towards), len(towards[0])))
            for place, rows, each in gradients.weights():
                norms[-1][rows, place] = each.square().sum(1)
                along[-1][rows, place] = each @ towards[place].T
        count = sum(map(len, norms))
        elements = [direction.shape[1] for direction in towards]
        dampings = (self.damping * torch.cat(norms).double().mean(0)).cpu().numpy() / elements
        swept = [torch.zeros_like(direction) for direction in towards]
        for gradients, squares, products in zip(next(passes), norms, along, strict=True):
            for place, rows, each in gradients.weights():
                # A weight without gradient in the sample: nothing is known of it, 0 over 1.
                own = float(dampings[place]) or 1.0
                part = products[rows, place] / (own + squares[rows, place, None])
                swept[place] += part.T @ each / count
        one = unit(dampings.tolist())
        return [
            (direction - part) * (one / own if own > 0 else 0.0)
            for direction, part, own in zip(towards, swept, dampings.tolist(), strict=True)
        ]
