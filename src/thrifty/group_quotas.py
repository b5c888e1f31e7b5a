"""Shares of the token budget for the groups of a pool: any picker, a group at a time.

A group is the rows with one value in a column of the pool (``selection.groups``). A value named in
``selection.quotas`` gets its share of the tokens at most; the others share what is left evenly, the
smallest first, and what one does not use goes to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Candidates, Picked, Picker
from thrifty.data.store import Store

NO_VALUE = ""
"""The group of rows without the column."""


def labels_of(pool: Store, column: str) -> NDArray[np.object_]:
    """[num_examples] the column's value of every row, as text. Raises ValueError where no row has
    it, naming those that there are."""
    values: list[str] = []
    each: dict[str, str] = {}
    """Once, however many rows have it."""
    seen: set[str] = set()
    for shard in pool.shards():
        for row in shard.rows:
            seen |= row.extra.keys()
            value = row.extra.get(column)
            text = NO_VALUE if value is None else str(value)
            values.append(each.setdefault(text, text))
    if column not in seen:
        there = ", ".join(sorted(seen)) or "none beside the text"
        raise ValueError(
            f"selection.groups names a column {column!r} that no row of the pool has\n"
            f"hint: its other columns are {there}"
        )
    return np.asarray(values, dtype=object)


def pick_by_group(
    picker: Picker,
    candidates: Candidates,
    labels: NDArray[np.object_],
    quotas: Mapping[str, float],
    max_tokens: float,
    seed: int,
    values: Sequence[str] | None = None,
) -> Picked:
    """``labels`` [n] of the candidates; ``values``: of the whole pool's rows, where not all are
    candidates. In order: every group's firsts, then what comes next, each group spread evenly over
    the whole.

    Raises ValueError for a quota of a value that no row has.
    """
    there = np.unique(labels).tolist()
    known = there if values is None else sorted(set(values))
    if unknown := sorted(set(quotas) - set(known)):
        raise ValueError(
            f"selection.quotas names {', '.join(map(repr, unknown))}, which no row has\n"
            f"hint: there are {', '.join(map(repr, known[:20]))}"
        )
    found: list[tuple[Picked, NDArray[np.float64]]] = []
    left = max_tokens

    def pick(value: str, most: float) -> None:
        nonlocal left
        group = candidates.where(np.flatnonzero(labels == value))
        picked = picker.pick(group, most, seed)
        left -= float(group.num_tokens[np.isin(group.ids, picked.ids)].sum())
        found.append((picked, (np.arange(len(picked.ids)) + 0.5) / max(len(picked.ids), 1)))

    for value in there:
        if value in quotas:
            pick(value, quotas[value] * max_tokens)
    sizes = {v: candidates.num_tokens[labels == v].sum() for v in there if v not in quotas}
    for turn, value in enumerate(sorted(sizes, key=lambda v: (sizes[v], v))):
        pick(value, left / (len(sizes) - turn))
    ids = np.concatenate([picked.ids for picked, _ in found])
    weights = np.concatenate([picked.weights for picked, _ in found])
    order = np.lexsort((ids, np.concatenate([place for _, place in found])))
    return Picked(ids=ids[order], weights=weights[order])
