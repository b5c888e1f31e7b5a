"""Packs of two lengths side by side: a short one, then one of the usual length.

Documents of at most ``short`` tokens go into the short packs, the others into the rest; where there
are no others, all do. Each kind has epochs of its own: its part of the same orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from thrifty.data.packing import IGNORED, Example, Order, PackedDataset

if TYPE_CHECKING:
    import torch


class TwoLengths:
    """A map-style dataset of ``num_items`` packs of ``short + sequence`` tokens; else as
    ``PackedDataset``.

    Raises ValueError where no document is short.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        short: int,
        sequence: int,
        *,
        num_items: int,
        order: Order,
        exact: bool = False,
    ) -> None:
        lengths = np.asarray([len(example.input_ids) for example in examples], dtype=np.int64)
        is_short = short_ones(lengths, short)
        is_long = np.ones_like(is_short) if is_short.all() else ~is_short
        self._packs = [
            PackedDataset(
                examples,
                size,
                num_items=num_items,
                order=_only(order, those),
                exact=exact,
            )
            for size, those in ((short, is_short), (sequence, is_long))
        ]

    def __len__(self) -> int:
        return len(self._packs[0])

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        import torch

        one, other = (packs[item] for packs in self._packs)
        return {name: torch.cat([column, other[name]]) for name, column in one.items()}


def short_ones(lengths: NDArray[np.int64], short: int) -> NDArray[np.bool_]:
    """Which documents have at most ``short`` tokens. Raises ValueError where none has."""
    found = lengths <= short
    if found.any():
        return found
    raise ValueError(
        f"none of {len(lengths):,} rows has at most {short} tokens, so that none would get a "
        f"gradient: the shortest has {lengths.min()}\n"
        f"hint: --set training.memory.trained.addax.short={int(np.median(lengths))}, or another "
        "selection, that keeps shorter ones"
    )


def _only(order: Order, those: NDArray[np.bool_]) -> Order:
    def among(number: int) -> NDArray[np.int64]:
        indices = np.asarray(order(number), dtype=np.int64)
        return indices[those[indices]]

    return among


def cut_at(short: int, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
    """The short packs of a batch and the others, [batch, short] and [batch, sequence]."""
    return (
        {name: column[:, :short] for name, column in batch.items()},
        {name: column[:, short:] for name, column in batch.items()},
    )


def num_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens that carry loss: none is the first of a document, so that none is lost by a shift."""
    return (batch["labels"] != IGNORED).sum()
