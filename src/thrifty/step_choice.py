"""A step on some rows of its batch alone, which the online method chooses by their gradients.

One forward pass and one backward of activations tell what every row would do to every weight; the
gradient of the chosen rows together is formed from that (``signals/gradient_mix.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from thrifty.batch_rows import BatchRows
from thrifty.rounds import Rounds
from thrifty.signals.example_gradients import BatchGradients, ExampleGradients
from thrifty.signals.gradient_mix import inner_products, mixed
from thrifty.signals.gradients import trained_matrices


class StepChoice:
    """For ``model`` in training, whose weights that require gradients are trained."""

    def __init__(self, model: Any, rounds: Rounds) -> None:
        self._model, self._rounds = model, rounds
        self._wanted = [weight for weight in model.parameters() if weight.requires_grad]
        self._gradients = ExampleGradients(model, self._wanted, keeps_apart=True)

    def step(self, batch: Mapping[str, Any], num_items: Any, number: int = 0) -> Any:
        """Add the gradient of the rows chosen to ``.grad`` and tell their loss; they weigh as much
        as all rows would.

        ``batch``: what ``PackedDataset`` gives where it tells rows, ``[batch, sequence]`` each;
        ``num_items``: tokens that carry loss in the whole optimizer step, of which this is
        ``number``; None: in this batch.
        """
        found = BatchRows.of(batch)
        with self._gradients as gradients:
            parts = [
                gradients.of_pack(ids[None], kept[None, 1:], places[None])
                for ids, kept, places in zip(
                    batch["input_ids"], found.carries_loss, batch["position_ids"], strict=True
                )
            ]
        there, counts = found.learnable, found.counts
        drawn = _Drawn(self._model, self._wanted, parts, there, counts[there], found.rows[there])
        chosen = there[torch.from_numpy(self._rounds.choose(drawn, number)).to(there.device)]
        total = counts.sum() if num_items is None else num_items
        weights = torch.zeros_like(counts)
        weights[chosen] = counts[chosen] * counts.sum() / counts[chosen].sum() / total
        for place, gradient in mixed(parts, weights):
            weight = self._wanted[place]
            own = gradient.to(weight.dtype)
            weight.grad = own if weight.grad is None else weight.grad + own
        return (torch.cat([part.losses for part in parts]) * weights).sum()


@dataclass(frozen=True)
class _Drawn:
    """``contracts.DrawnWithGradients``."""

    model: Any
    wanted: Sequence[Any]
    parts: Sequence[BatchGradients]
    there: Any
    """[n]: which of the documents."""
    counts: Any
    places: Any

    @property
    def rows(self) -> NDArray[np.int64]:
        return self.places.cpu().numpy()  # type: ignore[no-any-return]

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        return self.counts.cpu().numpy().astype(np.int64)  # type: ignore[no-any-return]

    def products(
        self, layers: int, direction: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        place_of = {id(weight): place for place, weight in enumerate(self.wanted)}
        places = [place_of[id(weight)] for weight in trained_matrices(self.model, layers)]
        given = torch.from_numpy(direction).to(self.wanted[0].device)
        towards, between = inner_products(self.parts, places, given)
        return (
            towards[self.there].double().cpu().numpy(),
            between[self.there][:, self.there].double().cpu().numpy(),
        )
