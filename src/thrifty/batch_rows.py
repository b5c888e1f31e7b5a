"""Which rows a packed batch holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thrifty.data.packing import IGNORED


@dataclass(frozen=True)
class BatchRows:
    """The documents of a batch that ``PackedDataset`` gave, one after the other, padding too."""

    document: Any
    """[batch, sequence]: of which each token is."""
    carries_loss: Any
    """[batch, sequence]"""
    counts: Any
    """[documents], float: tokens that carry loss."""
    rows: Any
    """[documents]: places in ``Chosen``; -1 for padding."""

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> BatchRows:
        """``batch``: ``[batch, sequence]`` each, with ``rows``."""
        starts = batch["position_ids"] == 0
        document = (starts.flatten().cumsum(0) - 1).view(starts.shape)
        carries = (batch["labels"] != IGNORED) & ~starts
        counts = torch.zeros(int(document.max()) + 1, device=document.device)
        counts.index_add_(0, document.flatten(), carries.flatten().float())
        return cls(document, carries, counts, batch["rows"][starts])

    @property
    def learnable(self) -> Any:
        """[n]: the documents with a token that carries loss."""
        return torch.nonzero(self.counts)[:, 0]
