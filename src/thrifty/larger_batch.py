"""A step on a few rows of a batch several times larger, told apart without a backward.

What is kept is packed anew into a batch of the usual size, so that training takes the memory and
the time that it always does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from thrifty.batch_rows import BatchRows
from thrifty.data.packed_attention import attention_of
from thrifty.data.packing import pack, packed_item
from thrifty.rounds import Rounds
from thrifty.signals.forward import next_token_losses
from thrifty.signals.last_layer import last_layer_alone, last_value_weight


class LargerBatch:
    """For ``model`` in training."""

    def __init__(self, model: Any, rounds: Rounds) -> None:
        self._model, self._rounds = model, rounds

    def smaller(self, batch: Mapping[str, Any], number: int = 0) -> tuple[dict[str, Any], float]:
        """``batch`` ``[larger * b, sequence]`` -> one ``[b, sequence]`` of the rows chosen, and
        which share of the tokens that carry loss it has. ``number``: of the optimizer's step."""
        found = BatchRows.of(batch)
        there = found.learnable
        size = len(batch["input_ids"]) // self._rounds.method.larger
        drawn = _Drawn(self._model, batch, found, there, size)
        places = there[torch.from_numpy(self._rounds.choose(drawn, number)).to(there.device)]
        rows = found.rows[places].tolist()
        sequence = batch["input_ids"].shape[1]
        packs = self._fitting(rows, size, sequence)
        packs += [[] for _ in range(size - len(packs))]
        items = [packed_item(self._rounds.chosen.tokens, pack, sequence) for pack in packs]
        epoch = int(batch["epoch"].max())
        made = {
            name: torch.from_numpy(np.stack([item[name] for item in items])).to(there.device)
            for name in items[0]
        }
        made["epoch"] = torch.full_like(made["rows"], epoch)
        kept = BatchRows.of(made).counts.sum() / found.counts.sum()
        return made, float(kept)

    def _fitting(self, rows: list[int], size: int, sequence: int) -> list[list[int]]:
        """As many of the first rows as ``size`` packs hold."""
        lengths = self._rounds.chosen.num_tokens[rows]
        most = len(rows)
        while most > 1 and len(pack(lengths[:most], sequence)) > size:
            most -= 1
        return [[rows[i] for i in members] for members in pack(lengths[:most], sequence)]


@dataclass(frozen=True)
class _Drawn:
    """``contracts.DrawnWithoutBackward``."""

    model: Any
    batch: Mapping[str, Any]
    found: BatchRows
    there: Any
    size: int
    """Packs that go through the model at a time."""

    @property
    def rows(self) -> NDArray[np.int64]:
        return self.found.rows[self.there].cpu().numpy()  # type: ignore[no-any-return]

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        return self.found.counts[self.there].cpu().numpy().astype(np.int64)  # type: ignore[no-any-return]

    @property
    def num_elements(self) -> int:
        return int(last_value_weight(self.model).numel())

    def slopes(self, directions: NDArray[np.float32], epsilon: float) -> NDArray[np.float64]:
        model, weight = self.model, last_value_weight(self.model)
        shifts = torch.from_numpy(directions).to(weight).view(-1, *weight.shape) * epsilon
        sums = torch.zeros(len(self.found.counts), len(shifts), dtype=torch.float64)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(self.batch["input_ids"]), self.size):
                    self._add(slice(start, start + self.size), weight, shifts, sums)
        finally:
            model.train(training)
        means = sums / self.found.counts.cpu().clamp_min(1)[:, None]
        return (means[self.there.cpu()] / (2 * epsilon)).numpy()  # type: ignore[no-any-return]

    def _add(self, some: slice, weight: Any, shifts: Any, sums: Any) -> None:
        """Of some packs what each direction changes, to the sums of their documents."""
        ids, places = (self.batch[name][some] for name in ("input_ids", "position_ids"))
        kept, document = self.found.carries_loss[some, 1:], self.found.document[some, 1:]
        given = {"input_ids": ids, "position_ids": places, **attention_of(self.model, places)}
        before = weight.detach().clone()
        with last_layer_alone(self.model, given) as logits:
            for number, shift in enumerate(shifts):
                change: Any = 0.0
                for sign in (1, -1):
                    weight.copy_(before + sign * shift)
                    change = change + sign * next_token_losses(logits()[:, :-1].float(), ids)
                weight.copy_(before)
                sums[:, number].index_add_(0, document[kept].cpu(), change[kept].double().cpu())
