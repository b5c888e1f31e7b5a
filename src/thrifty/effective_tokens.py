"""How many fresh, uniformly chosen tokens the tokens trained on are worth.

What the budget leaves after scoring buys D training tokens, worth

    D_eff = q * w(s) * D'(D, U),       w(s) = w_5%^min(1, ln(1/s) / ln 20),
    D'(D, U) = U + U R* (1 - exp(-(D/U - 1) / R*)),  R* = 15.4         (arXiv:2305.16264)

with U the tokens kept, s = U / pool, w_5% the scorer's prior worth (which keeping less than the 5%
it was measured at does not raise: docs/log.md, the mixed pool) and q the techniques' prior
quality. U is D over the number of epochs, at most four, that makes D_eff largest. Gains enter the
one rule as ``prior`` estimates, a fixed concave function of D_eff: only their order matters here.
"""

from __future__ import annotations

import math

from thrifty.core.contracts import Worth
from thrifty.core.marginal import Estimate

REPEAT_HALF_LIFE = 15.4
"""R* of arXiv:2305.16264."""
MAX_EPOCHS = 4


def best_repetition(
    worth: Worth,
    tokens: float,
    pool_tokens: float,
    longest: float,
    fixed_keep: float | None = None,
    fixed_epochs: float | None = None,
) -> tuple[float, float, float]:
    """Epochs, tokens to keep and the effective tokens: at their best, or as they are fixed.

    No less is kept than the ``longest`` row has tokens, or a short run would keep no row at all.
    """
    if fixed_keep:
        unique = min(float(fixed_keep), pool_tokens)
        return tokens / unique, unique, _effective(worth, tokens, unique, pool_tokens)
    best = (1.0, min(tokens, pool_tokens), -math.inf)
    for epochs in [fixed_epochs] if fixed_epochs else range(1, MAX_EPOCHS + 1):
        unique = min(max(tokens / epochs, longest), pool_tokens)
        effective = _effective(worth, tokens, unique, pool_tokens)
        if effective > best[2] * (1 + 1e-9):
            best = (tokens / unique, unique, effective)
    return best


def _effective(worth: Worth, tokens: float, unique: float, pool_tokens: float) -> float:
    share = unique / pool_tokens if math.isfinite(pool_tokens) else 1.0
    return worth_of_share(worth, share) * fresh_tokens(max(tokens, unique), unique)


def worth_of_share(worth: Worth, share: float) -> float:
    """w(s): of a token, where that share of the pool is kept."""
    return float(worth.mean ** min(1.0, math.log(1 / max(share, 1e-6)) / math.log(20)))


def fresh_tokens(tokens: float, unique: float) -> float:
    """D'(D, U): how many tokens seen once those are worth that go through ``unique`` ones again and
    again; all of them until each was seen."""
    if tokens <= unique:
        return tokens
    repeats = tokens / unique - 1.0
    return unique + unique * REPEAT_HALF_LIFE * -math.expm1(-repeats / REPEAT_HALF_LIFE)


def prior_gain(effective: float, quality: Worth, worth: Worth) -> Estimate:
    """A concave prior: 0.1 nats a token for every e-fold of effective tokens past a thousand. Its
    error is that of the priors it rests on."""
    relative = math.hypot(worth.stderr / worth.mean, quality.stderr / quality.mean)
    mean = 0.1 * math.log1p(effective * quality.mean / 1e3)
    return Estimate(mean, 0.1 * relative, "nats/token", "prior")


def tokens_behind(gain: float) -> float:
    """Effective tokens, quality included, that ``prior_gain`` makes a gain of."""
    return 1e3 * math.expm1(max(gain, 0.0) / 0.1)
