"""LoRA on the direction of each weight row, and its length apart.

y = (g / |W + s B A|) (W x + s B A x), s = alpha / rank, with a trained length g of each row. The
norms are made anew in every forward, out of whole matrices, and get no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.core.contracts import Worth
from thrifty.holding.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRank):
    """LoRA on the direction of each weight row, and its length apart."""

    searched = False
    source = "arXiv:2402.09353"
    worth = Worth(0.65, 0.15, "arXiv:2402.09353: 1 to 4 points above LoRA, at equal tokens")
    learning_rate = 10.0  # arXiv:2402.09353 appendix: as for LoRA, or somewhat less
    form = "dora"
