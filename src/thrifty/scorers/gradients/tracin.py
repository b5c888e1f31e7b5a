"""TracIn: how much a gradient step on a row would lower the target's loss, summed over checkpoints
(TracInCP, Pruthi et al. 2020, arXiv:2002.08484).

    score(z, target) = mean over i and over v in target of
                       < S grad L(v; theta_i),  S grad L(z; theta_i) >

theta_i and S as in ``less``: checkpoints of a LoRA warm-up, a count-sketch. Lengths count: a row
with a large gradient scores high, which short rows have more often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Worth
from thrifty.signals.warm_scorer import WarmScorer


@dataclass(frozen=True, kw_only=True)
class Tracin(WarmScorer):
    """Rows on which a gradient step would lower the target's loss most, over LoRA checkpoints."""

    source: ClassVar[str] = "arXiv:2002.08484"
    worth: ClassVar[Worth] = Worth(
        2.0, 1.5, "between random and LESS, whose ablations drop Adam and the cosine: 2402.04333"
    )
    by_adam: ClassVar[bool] = False
    by_cosine: ClassVar[bool] = False
