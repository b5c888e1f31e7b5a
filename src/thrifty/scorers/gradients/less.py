"""LESS: rows whose Adam step would lower the target's loss (arXiv:2402.04333).

    score(z, target) = mean over i and over v in target of
                       cos( S grad L(v; theta_i),  S Gamma(z; theta_i) )

theta_i are the checkpoints, an epoch apart, of a LoRA warm-up on a small share of the pool, Gamma
the direction of Adam's step on z, S a projection to few dimensions: a count-sketch, where the paper
has a dense one. The learning rate is constant, so that checkpoints weigh alike. The paper takes 5%
of the pool and four epochs; the defaults here are half as dear. ``model`` may be smaller than the
one to be trained, as in the paper's transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import Worth
from thrifty.signals.warm_scorer import WarmScorer


@dataclass(frozen=True, kw_only=True)
class Less(WarmScorer):
    """Rows whose Adam step points where the target's gradient does, over LoRA checkpoints."""

    source: ClassVar[str] = "arXiv:2402.04333"
    worth: ClassVar[Worth] = Worth(
        3.5, 2.0, "8 to 13 times random at 2.5% of the pool, arXiv:2410.16208; 2 checkpoints here"
    )
    by_adam: ClassVar[bool] = True
    by_cosine: ClassVar[bool] = True
