"""A ``Trainer`` that makes its passes in as many pieces as it takes to fit.

The gradients of pieces add up to those of the whole: a loss that is a sum over the tokens of the
optimizer's batch by itself, one that is a mean over its own batch by the share that it has of it.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from thrifty.data.packing import IGNORED
from thrifty.in_pieces import Pieces, ran_out, random_state, restore
from thrifty.sharded_trainer import ShardedTrainer


class PiecewiseTrainer(ShardedTrainer):
    """The pieces are kept beside the checkpoints, in ``folder``."""

    current_gradient_accumulation_steps: float

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.pieces = Pieces(folder)
        self._batch: list[Any] = []
        """The micro-batches of the optimizer's step under way."""
        self._taken = 0
        """How many of them are in the gradients."""
        self._random: list[Any] = []
        """What was drawn from when it began."""
        super().__init__(**settings)

    @abstractmethod
    def shrink(self, where: str, why: str, *, even_so: bool = False) -> None:
        """After memory ran out: free what can be, and have passes made in smaller pieces. Raises
        OutOfMemory where there are none, unless it is worth a try ``even_so``."""

    @abstractmethod
    def begin_anew(self) -> None:
        """What the step under way did so far was for nothing."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; kept, for where the step must be begun anew."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        self._batch, self._taken = samples, 0
        return samples, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As ever. Where memory runs out all of the step so far is thrown away and made again in
        smaller pieces, from the same random numbers."""
        if not self._taken:
            self._random = random_state()
        first = self._taken
        while True:
            try:
                for batch in self._batch[first : self._taken + 1]:
                    loss = self._in_pieces(model, batch, num_items_in_batch)
            except Exception as error:
                if not ran_out(error):
                    raise
                why = str(error)  # and not the error, which holds what its passes held
            else:
                self._taken += 1
                return loss
            self.shrink(f"step {self.state.global_step + 1}", why)
            self.begin_anew()
            restore(self._random)
            first = 0

    def _in_pieces(self, model: Any, batch: Any, num_items: Any) -> Any:
        """The loss of a micro-batch, its gradients added to those that are there."""
        times = self.current_gradient_accumulation_steps
        pieces = list(self.pieces.of(batch, self.num_rows(batch)))
        losses = []
        for number, (piece, share) in enumerate(pieces):
            # Where a loss is a mean over its own batch, it counts by its share of that.
            self.current_gradient_accumulation_steps = times / _share(piece, batch, share)
            last = number == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(self.make_pass(model, piece, num_items))
        self.current_gradient_accumulation_steps = times
        return sum(losses[1:], losses[0])

    def make_pass(self, model: Any, inputs: Any, num_items: Any) -> Any:
        """A forward and a backward, whole."""
        return super().training_step(model, inputs, num_items)

    def num_rows(self, batch: Any) -> int:
        """That can be told apart in a micro-batch."""
        return len(batch["input_ids"])


def _share(piece: Any, batch: Any, rows: float) -> float:
    """Of what a batch is averaged over, what a piece of it has: tokens that carry loss, or ``rows``
    where the batch says nothing of tokens."""
    if piece["input_ids"] is batch["input_ids"]:
        return 1.0
    if "labels" not in batch:
        return rows
    counts = [(part["labels"][..., 1:] != IGNORED).sum().item() for part in (piece, batch)]
    return float(counts[0] / counts[1]) if counts[0] else rows
