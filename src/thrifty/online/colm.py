"""CoLM: a few rows that stand for a batch several times larger (Nguyen et al. 2025,
arXiv:2407.19580).

    g_i = 1/m sum_j  [L_i(W + e z_j) - L_i(W - e z_j)] / 2e  z_j,      z_j ~ N(0, I)
    h_i = g_i / (sqrt(v) + eps),    v <- b v + (1 - b) mean_i(g_i)^2

W is the last layer's value projection, L_i a row's mean loss: a zeroth-order gradient, for which
the last layer alone runs again. Of h the ``dimensions`` largest on average count. All rows of small
groups are kept (``selection.groups``; a group with less than ``small_share`` of the rows); of every
other group the medoids, as many as its share, by lazy greedy on L1 distances. With one z the g are
all along it; the paper's estimate has one, more of them tell rows apart better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from thrifty.core.budget import Cost
from thrifty.core.contracts import (
    Choice,
    Chosen,
    DrawnWithoutBackward,
    OnlineMethod,
    Progress,
    Round,
)
from thrifty.core.ranges import check_ranges
from thrifty.costs.flops import forward_flops
from thrifty.signals.last_layer import VALUE
from thrifty.signals.submodular import lazy_greedy

if TYPE_CHECKING:
    from thrifty.costs.setting import MemorySetting
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Colm(OnlineMethod):
    """A few rows that stand for a batch several times larger, by zeroth-order gradients."""

    larger: int = 2
    """How many times a step's rows are drawn."""
    probes: int = 4
    """m, directions along which the loss is looked at."""
    epsilon: float = 1e-3
    decay: float = 0.9
    """b, of the mean squared gradient from step to step."""
    dimensions: int = 2560
    small_share: float = 0.05

    source: ClassVar[str] = "arXiv:2407.19580"
    cost_class: ClassVar[Literal["free", "forward", "gradient"]] = "forward"
    chooses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(
            self,
            larger=(2, 64),
            probes=(1, 64),
            epsilon=(1e-8, 1),
            decay=(0, 1),
            dimensions=(1, inf),
            small_share=(0, 1),
        )

    def step_cost(self, step: Cost, shape: ModelShape, setting: MemorySetting) -> Cost:
        once = forward_flops(shape, setting.micro_batch, setting.sequence)
        last = forward_flops(replace(shape, num_layers=1), setting.micro_batch, setting.sequence)
        more = self.larger * (once + 2 * self.probes * last)
        return replace(
            step, flops=step.flops + more, seconds=step.seconds * (1 + more / step.flops)
        )

    def refuses(self, shape: ModelShape, setting: MemorySetting) -> str | None:
        names = [linear.name for linear in shape.linears_of(shape.num_layers - 1)]
        if not any(name.endswith(VALUE) for name in names):
            return (
                f"the last layer of {shape.model_type} has no {VALUE} of its own\n"
                "hint: take another online method"
            )
        return None

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        return Round(rows=now.least_drawn(np.arange(len(chosen)), chosen.num_tokens))

    def choose(
        self,
        batch: DrawnWithoutBackward,
        chosen: Chosen,
        known: Mapping[str, NDArray[Any]],
        random: np.random.Generator,
    ) -> Choice:
        directions = random.standard_normal((self.probes, batch.num_elements), dtype=np.float32)
        slopes = batch.slopes(directions, self.epsilon)
        mean = slopes.mean(0) @ directions / self.probes
        spread = self.decay * known.get("spread", mean**2) + (1 - self.decay) * mean**2
        scale = 1 / (np.sqrt(spread) + 1e-12)
        most = np.argsort(-np.abs(mean * scale), kind="stable")[: self.dimensions]
        features = slopes @ (directions[:, most] * scale[most]) / self.probes
        tokens = chosen.num_tokens[batch.rows].astype(np.float64)
        groups = np.zeros(len(chosen), dtype=np.int64) if chosen.groups is None else chosen.groups
        places = self._medoids(features, tokens, groups[batch.rows], groups)
        return Choice(places=places, learnt={"spread": spread})

    def _medoids(
        self,
        features: NDArray[np.float64],
        tokens: NDArray[np.float64],
        groups: NDArray[np.int64],
        of_all: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Rows of small groups first, then the medoids of the others."""
        names, count = np.unique(of_all, return_counts=True)
        small = np.isin(groups, names[count < self.small_share * len(of_all)])
        if small.all():
            return np.arange(len(groups))
        kept = [np.flatnonzero(small)]
        most = max(tokens.sum() / self.larger - tokens[small].sum(), 0.0)
        large = tokens[~small].sum()
        for name in np.unique(groups[~small]):
            own = np.flatnonzero((groups == name) & ~small)
            distances = cdist(features[own], features[own], "cityblock")
            likeness = distances.max() - distances + 1e-12
            share = most * tokens[own].sum() / large
            kept.append(own[lazy_greedy(likeness, tokens[own], share)])
        found = np.concatenate(kept)
        return found if len(found) else np.array([int(np.argmin(tokens))])
