"""Pairs of answers in batches of like lengths, padded, as TRL's ``DPOTrainer`` takes them.

Item: the two sequences of a pair (``tokens.Tokens.sides``) and, where it is known, what the
reference gives their answers. Items follow one another through as many epochs as they take, each in
its own order, and ``batch`` of them next to each other are of like lengths: within a window of the
order they are sorted by their longer side, and the batches come by their first pair; the longest of
all begins, so that one that does not fit shows at once. What is left over of an epoch begins the
next. All of it is a function of the orders, so that a run that resumes
at item k sees the item k it would have seen.

``collate`` pads a batch to its longest sequence: chosen answers in the first half, rejected ones in
the second, as ``trl.trainer.dpo_trainer.DataCollatorForPreference`` does; loss falls on what the
mask of the tokens says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.data.packing import Order
from thrifty.data.tokens import Tokens


class PairedDataset:
    """A map-style dataset for ``torch.utils.data``, to be read in its order."""

    def __init__(
        self,
        examples: Sequence[Tokens],
        batch: int,
        *,
        num_items: int,
        order: Order,
        exact: bool = False,
        window: int = 1024,
    ) -> None:
        """``exact``: pairs follow one another as in the order, at the price of more padding."""
        self.examples = examples
        self.reference: NDArray[np.float32] | None = None
        """[n, 2]: log-probabilities of the chosen and the rejected answers under the reference."""
        self._lengths = np.array([longer_side(each) for each in examples], dtype=np.int64)
        self._batch, self._num_items, self._order = batch, num_items, order
        self._exact = exact
        self._window = batch if exact else max(window // batch, 1) * batch
        self._rows: list[int] = []
        self._waiting: list[int] = []
        self._num_epochs = 0

    def __len__(self) -> int:
        return self._num_items

    def row(self, item: int) -> int:
        """The example that an item is."""
        if item >= len(self):
            raise IndexError(item)
        while item >= len(self._rows):
            self._arrange_an_epoch()
        return self._rows[item]

    def _arrange_an_epoch(self) -> None:
        rows = [*self._waiting, *map(int, self._order(self._num_epochs))]
        first = not self._num_epochs
        self._num_epochs += 1
        whole = len(rows) // self._batch * self._batch
        for start in range(0, whole, self._window):
            part = rows[start : min(start + self._window, whole)]
            places = np.argsort(self._lengths[part], kind="stable").reshape(-1, self._batch)
            for members in sorted(sorted(batch) for batch in places.tolist()):
                self._rows += [part[place] for place in members]
        self._waiting = rows[whole:]
        if first and self._rows and not self._exact:
            self._longest_first()

    def _longest_first(self) -> None:
        """The batch with the longest pair comes first: what does not fit shows at once."""
        longest = int(np.argmax(self._lengths[self._rows])) // self._batch * self._batch
        moved = self._rows[longest : longest + self._batch]
        del self._rows[longest : longest + self._batch]
        self._rows[:0] = moved

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self.row(item)
        known = {} if self.reference is None else {"reference": self.reference[row]}
        return {"sides": self.examples[row].sides, **known}


def longer_side(pair: Tokens) -> int:
    return max(len(side.input_ids) for side in pair.sides)


def collate(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``completion_mask`` [2 pairs, longest], int64; with
    ``ref_chosen_logps`` and ``ref_rejected_logps`` [pairs] where they are known."""
    import torch

    sides = [pair["sides"][which] for which in (0, 1) for pair in pairs]
    longest = max(len(side.input_ids) for side in sides)
    batch = {
        name: np.zeros((len(sides), longest), dtype=np.int64)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, side in enumerate(sides):
        size = len(side.input_ids)
        batch["input_ids"][row, :size] = side.input_ids
        batch["attention_mask"][row, :size] = 1
        batch["completion_mask"][row, :size] = side.loss_mask
    if "reference" in pairs[0]:
        known = np.stack([pair["reference"] for pair in pairs])
        batch |= {"ref_chosen_logps": known[:, 0], "ref_rejected_logps": known[:, 1]}
    return {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in batch.items()}
