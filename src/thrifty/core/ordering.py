"""Orders that depend on nothing but their arguments: random keys by (seed, id), ranks, fillings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from thrifty.core.contracts import Candidates


def random_key(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """[n] pseudo-random 64-bit keys, one to one with the ids under a seed (SplitMix64).

    A row's key does not depend on which other rows there are, so neither do ties broken by it.
    """
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def best_first(
    scores: NDArray[np.floating], ids: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Indices by score, highest first; equals by ``random_key``."""
    return np.lexsort((random_key(ids, seed), -scores.astype(np.float64)))


def fill(num_tokens: NDArray[np.int64], max_tokens: float) -> NDArray[np.int64]:
    """Indices, in order, of the rows that fit a token budget, each taken if it still fits."""
    kept, used = [], 0
    smallest = int(num_tokens.min()) if len(num_tokens) else 0
    for place, tokens in enumerate(num_tokens.tolist()):
        if used + tokens <= max_tokens:
            kept.append(place)
            used += tokens
        elif used + smallest > max_tokens:
            break
    return np.asarray(kept, dtype=np.int64)


def reached(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Indices of the rows that have a score for a target at least."""
    return np.flatnonzero(~np.isnan(scores).all(axis=1))


def merged_scores(
    scores: NDArray[np.floating], weights: Sequence[float], *, by: Literal["mean", "max"] = "mean"
) -> NDArray[np.float64]:
    """[n]: the score itself, or with several targets the weighted mean of a row's ranks, so that
    targets whose scores differ in scale count alike; or its best rank. No score is the lowest."""
    known = np.nan_to_num(scores.astype(np.float64), nan=-np.inf)
    if known.shape[1] == 1:
        return known[:, 0]
    shares = np.asarray(weights) / np.sum(weights)
    ranks = [np.unique(column, return_inverse=True)[1] for column in known.T]
    placed = np.stack([r / max(r.max(initial=0), 1) for r in ranks], axis=1)
    return placed.max(axis=1, initial=0.0) if by == "max" else placed @ shares


def even_draw(
    groups: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    ids: NDArray[np.int64],
    max_tokens: float,
    seed: int,
    *,
    scores: NDArray[np.floating] | None = None,
) -> NDArray[np.int64]:
    """Indices within a token budget: of every group as many tokens as it has, up to an equal share.

    The smallest group comes first, and what it leaves is shared among the others. Within a group
    the best-scored, at random where there are no scores. In order: the groups' firsts, then their
    seconds, and so on.
    """
    order = best_first(np.zeros(len(ids)) if scores is None else scores, ids, seed)
    members = {g: order[groups[order] == g] for g in np.unique(groups).tolist()}
    by_size = sorted(members, key=lambda g: (num_tokens[members[g]].sum(), g))
    kept: list[tuple[int, int]] = []  # (place within its group, index)
    left = float(max_tokens)
    for turn, group in enumerate(by_size):
        rows = members[group]
        taken = rows[fill(num_tokens[rows], left / (len(by_size) - turn))]
        left -= float(num_tokens[taken].sum())
        kept += [(place, int(row)) for place, row in enumerate(taken.tolist())]
    kept.sort()
    return np.asarray([row for _, row in kept], dtype=np.int64)


def best_of_groups(rows: Candidates, groups: NDArray[Any], reason: str) -> dict[int, str]:
    """id -> ``reason of row ID`` for all but the best-scored of each group; of equals the lowest id
    stays."""
    best = np.nan_to_num(rows.scores, nan=-np.inf).max(axis=1, initial=-np.inf)
    order = np.lexsort((rows.ids, -best, groups))
    same = np.r_[False, groups[order][1:] == groups[order][:-1]] if len(rows) else np.zeros(0, bool)
    keeper = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    ids = rows.ids[order]
    return {
        row: f"{reason} of row {kept}"
        for row, kept in zip(ids[same].tolist(), ids[keeper[same]].tolist(), strict=True)
    }
