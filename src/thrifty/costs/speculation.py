"""Speculative decoding: tokens a round, and whether a draft model pays (arXiv:2211.17192).

A draft model guesses k tokens, which the model checks in one pass of k + 1. Where a token is
accepted with probability a, a pass of the draft takes c passes of the model, and the check v,

    tokens a round = (1 - a^(k+1)) / (1 - a),    speedup = tokens a round / (c k + v)

The paper has v = 1: a pass over k + 1 tokens takes as long as one over a single token. That holds
while weights are waited for, and no longer in large batches or on a slow processor, which is why
drafts so often make decoding slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thrifty.costs.decoding import token_seconds, tokens_a_round

if TYPE_CHECKING:
    from thrifty.costs.hardware import Device
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Whether a draft model pays."""

    acceptance: float
    """Probability that a drafted token is accepted."""
    drafted: int
    """Tokens at a time."""
    draft_pass: float
    """What a pass of the draft takes, in passes of the model over one token."""
    check_pass: float = 1.0
    """What a pass of the model over the drafted tokens and one more takes, likewise."""

    def __post_init__(self) -> None:
        for name, most in (("acceptance", 1.0), ("draft_pass", math.inf), ("check_pass", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be at least 0, at most {most:g}\nhint: a ratio")

    @classmethod
    def predicted(
        cls,
        shape: ModelShape,
        draft: ModelShape,
        *,
        acceptance: float,
        drafted: int,
        rows: int,
        context: int,
        dtype: str,
        device: Device,
    ) -> Speculation:
        """With the seconds that the device takes for passes of ``rows`` together."""
        one = token_seconds(shape, rows, context, dtype, device)
        check = token_seconds(shape, rows, context, dtype, device, drafted + 1)
        return cls(
            acceptance=acceptance,
            drafted=drafted,
            draft_pass=token_seconds(draft, rows, context, dtype, device) / one,
            check_pass=check / one,
        )

    @property
    def tokens_a_round(self) -> float:
        return tokens_a_round(self.acceptance, self.drafted)

    @property
    def speedup(self) -> float:
        """Below 1 it is slower than without."""
        return self.tokens_a_round / (self.drafted * self.draft_pass + self.check_pass)

    @property
    def pays(self) -> bool:
        return self.speedup > 1

    def best(self, most: int = 16) -> int:
        """How many tokens to draft; 0: none, as no number of them pays. The check is taken to grow
        evenly from one token on."""
        growth = (self.check_pass - 1) / max(self.drafted, 1)

        def speedup(k: int) -> float:
            return replace(self, drafted=k, check_pass=1 + growth * k).speedup if k else 1.0

        return max(range(most + 1), key=speedup)

    def __str__(self) -> str:
        told = (
            f"{self.acceptance:.0%} of drafted tokens are accepted: {self.tokens_a_round:.2f} "
            f"tokens a round, which takes {self.drafted * self.draft_pass + self.check_pass:.2f} "
            f"passes: {self.speedup:.2f} times as fast as without a draft"
        )
        best = self.best()
        if self.pays and best == self.drafted:
            return told
        return f"{told}; {f'draft {best} tokens' if best else 'leave the draft model out'}"
