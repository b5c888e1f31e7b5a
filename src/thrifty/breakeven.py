"""When scoring pays: the gain of a scorer less its cost, by how much smaller its model is.

For a model to train, a pool and a budget: what scoring the pool costs (``Scorer.cost``) with the
same architecture made smaller, what the rest buys, and what those tokens are worth over as many
FLOPs of uniformly chosen ones (``effective_tokens.py``). A prior throughout: the scorer's worth is
taken to be that of its file for every size. Published thresholds are 5x for forward scores and 10x
for gradients (arXiv:2410.16208).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from thrifty.core.budget import PoolStats
from thrifty.core.contracts import Scorer, Work, Worth
from thrifty.core.resolve import name_of, resolve
from thrifty.costs.flops import train_flops
from thrifty.costs.hardware import Device, load_device
from thrifty.costs.shape import ModelShape, read_config
from thrifty.effective_tokens import MAX_EPOCHS, best_repetition, prior_gain
from thrifty.priors import load_priors
from thrifty.signals.models import locate

RATIOS = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)
"""Aimed at; what whole heads and layers come to is what is told."""
MARKS = (5, 10)
SCORERS = ("perplexity", "embedding", "grad_cosine", "less")
"""Asked where none is named: two by a forward pass, two by gradients."""
MAX_LENGTH = 1024
TARGET_ROWS = 256
"""Rows that show what is wanted, where a scorer asks for them."""
SAME = Worth(1.0, 0.0, "")


def facts_of(
    model: str,
    flops: float,
    pool_tokens: float,
    row_tokens: float,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What ``thrifty law breakeven`` answers.

    Raises ValueError for a model or scorers that cannot be priced.
    """
    folder, _ = locate(model, None, weights=False)
    config = read_config(folder)
    shape = ModelShape.from_config(config)
    smaller = list(
        {s.num_parameters: s for s in (smaller_shape(config, r) for r in RATIOS)}.values()
    )
    ratios = [shape.num_parameters / each.num_parameters for each in smaller]
    if ratios[-1] < MARKS[-1]:
        raise ValueError(
            f"a {shape.model_type} of {shape.num_parameters:,} parameters is not made "
            f"{MARKS[-1]} times smaller by fewer heads and layers alone\n"
            "hint: a larger model, or a Llama of its size, which costs about the same"
        )
    scorers = [resolve("scorer", name) for name in names or SCORERS]
    pool = _pool(pool_tokens, row_tokens)
    device = load_device("h100")  # FLOPs alone are asked of it
    curves = [
        _curve(scorer, smaller, ratios, shape, pool, flops, device)
        for scorer in scorers
        if scorer.needs_model
    ]
    left_out = [name_of(scorer) for scorer in scorers if not scorer.needs_model]
    return {
        "model": {"name": model, "num_parameters": shape.num_parameters},
        "flops": flops,
        "pool_tokens": pool_tokens,
        "ratios": ratios,
        "marks": list(MARKS),
        "scorer_parameters": [each.num_parameters for each in smaller],
        "scorers": curves,
        "notes": [
            *(f"{name} asks no model: no size to choose" for name in left_out),
            *_nothing_to_choose(shape, flops, pool_tokens),
        ],
    }


def _nothing_to_choose(shape: ModelShape, flops: float, pool_tokens: float) -> list[str]:
    epochs = flops / _flops_per_token(shape) / pool_tokens
    if epochs < MAX_EPOCHS:
        return []
    return [
        f"the budget trains {epochs:.3g} times on the whole pool: there is nothing to choose, and "
        "scoring only costs"
    ]


def smaller_shape(config: Mapping[str, Any], ratio: float) -> ModelShape:
    """``config`` with layers, width and mlp cut alike until it has a ``ratio``-th of the
    parameters, as nearly as whole heads allow; vocabulary and head size stay."""
    whole = ModelShape.from_config(config)
    wanted = whole.num_parameters / ratio
    heads = whole.num_attention_heads
    best = whole
    for count in range(1, heads + 1):
        share = count / heads
        for layers in {math.ceil(whole.num_layers * share), math.floor(whole.num_layers * share)}:
            if layers < 1:
                continue
            shape = ModelShape.from_config(_cut(config, whole, count, layers))
            if abs(math.log(shape.num_parameters / wanted)) < abs(
                math.log(best.num_parameters / wanted)
            ):
                best = shape
    return best


def _cut(config: Mapping[str, Any], whole: ModelShape, heads: int, layers: int) -> dict[str, Any]:
    share = heads / whole.num_attention_heads
    key_values = max(
        d for d in range(1, heads + 1) if heads % d == 0 and d <= whole.num_key_value_heads
    )
    width = round(whole.hidden_size * share)
    changed = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
        "intermediate_size": round(whole.intermediate_size * share),
    }
    return {**config, **{key: value for key, value in changed.items() if key in config}}


def _curve(
    scorer: Scorer,
    smaller: Sequence[ModelShape],
    ratios: Sequence[float],
    shape: ModelShape,
    pool: PoolStats,
    flops: float,
    device: Device,
) -> dict[str, Any]:
    """By ratio: the cost of scoring, its share of the budget and the gain over uniform (None where
    scoring takes all); where the gain stays above zero from."""
    each = _flops_per_token(shape)
    worth = load_priors().of(scorer)
    uniform = _gain(SAME, flops / each, pool)
    costs = [_cost(scorer, other, pool, device) for other in smaller]
    gains = [
        _gain(worth, (flops - cost) / each, pool) - uniform if cost < flops else None
        for cost in costs
    ]
    return {
        "name": name_of(scorer),
        "cost_class": scorer.cost_class,
        "worth": worth.mean,
        "flops": costs,
        "share_of_budget": [cost / flops for cost in costs],
        "gain": gains,
        "breakeven": breakeven(ratios, gains),
    }


def _flops_per_token(shape: ModelShape) -> float:
    return train_flops(shape, 1, MAX_LENGTH) / MAX_LENGTH


def _cost(scorer: Scorer, shape: ModelShape, pool: PoolStats, device: Device) -> float:
    target = pool.part(min(1.0, TARGET_ROWS / pool.num_examples))
    work = Work(
        pool=pool,
        targets={"target": target},
        shape=shape,
        device=device,
        dtype="bfloat16",
        max_length=MAX_LENGTH,
    )
    return scorer.cost(work).flops or 0.0


def _gain(worth: Worth, tokens: float, pool: PoolStats) -> float:
    if tokens <= 0:
        return 0.0
    _, _, effective = best_repetition(worth, tokens, pool.num_tokens, pool.max_tokens)
    return prior_gain(effective, SAME, worth).mean


def breakeven(ratios: Sequence[float], gains: Sequence[float | None]) -> float | None:
    """The ratio from which on all gains are above zero; None where the last is not. Between two
    ratios by their gains, on a logarithmic scale; just after one that takes all of the budget, the
    next."""
    good = len(gains)
    while good and (gain := gains[good - 1]) is not None and gain > 0:
        good -= 1
    if good == len(gains):
        return None
    before = gains[good - 1] if good else None
    after = gains[good]
    if before is None or after is None:
        return ratios[good]
    share = before / (before - after)
    return float(ratios[good - 1] * (ratios[good] / ratios[good - 1]) ** share)


def _pool(tokens: float, row_tokens: float) -> PoolStats:
    rows = max(1, round(tokens / row_tokens))
    return PoolStats(
        num_examples=rows,
        num_tokens=round(tokens),
        max_tokens=min(MAX_LENGTH, math.ceil(row_tokens)),
        num_loss_tokens=round(tokens),
    )
