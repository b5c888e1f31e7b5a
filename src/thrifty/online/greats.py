"""Of each batch the rows that would lower the target's loss most, without repeating one another
(GREATS, Wang et al. 2024, arXiv:2410.23082 is its Shapley kin; OpenReview 232VcN8tSx).

    U(z | S) = <g_z, g_target> - redundancy / (keep n) sum over s in S of <g_z, g_s>

greedily, until ``keep`` of the batch's tokens are chosen: the paper's eta g_z . g_target - eta^2
g_z^T H sum_S g_s with its H = I, and eta in the unit in which redundancy 1 wants the chosen rows'
mean gradient to be the target's. g are gradients of mean losses over what is trained of the last
``layers`` decoder layers. That of the target is worked out ``renewals`` times in a run; those of
the rows come from the step's own backward, and the gradient of the chosen is formed from it, so
that a step takes the matrices' gradients of those layers once more and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import (
    Choice,
    Chosen,
    DrawnWithGradients,
    Meter,
    Models,
    OnlineMethod,
    Progress,
    Round,
    Rows,
    Work,
)
from thrifty.core.ranges import check_ranges
from thrifty.signals.example_gradients import each_batch
from thrifty.signals.gradients import (
    trained_cost,
    trained_elements,
    trained_flops,
    trained_matrices,
)
from thrifty.signals.metering import adapter_of

if TYPE_CHECKING:
    from thrifty.costs.setting import MemorySetting
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Greats(OnlineMethod):
    """Of each batch the rows that lower the target's loss most, by their gradients."""

    keep: float = 0.5
    """Share of a batch's tokens that is trained on."""
    redundancy: float = 1.0
    layers: int = 1
    """The last so many decoder layers; 0: all."""
    max_target_rows: int = 32
    """Of each target, drawn anew each time."""
    renewals: int = 4

    source: ClassVar[str] = "OpenReview 232VcN8tSx (NeurIPS 2024)"
    cost_class: ClassVar[Literal["free", "forward", "gradient"]] = "gradient"
    chooses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(
            self,
            keep=(1e-3, 1),
            redundancy=(0, inf),
            layers=(0, inf),
            max_target_rows=(1, inf),
            renewals=(1, 20),
        )

    def renewal_cost(self, work: Work) -> Cost:
        total = Cost()
        for target in work.targets.values():
            share = min(1.0, self.max_target_rows / max(target.num_examples, 1))
            total += trained_cost(work, target.part(share), self.layers)
        return total

    def step_cost(self, step: Cost, shape: ModelShape, setting: MemorySetting) -> Cost:
        again = 2.0 * setting.tokens * trained_elements(shape, setting.adapter, self.layers)
        more = 1 + again / step.flops
        return replace(
            step,
            flops=step.flops + again,
            seconds=step.seconds * more,
            peak_memory_bytes=step.peak_memory_bytes + _gradients_bytes(shape, setting),
        )

    def refuses(self, shape: ModelShape, setting: MemorySetting) -> str | None:
        if setting.recompute:
            return (
                "it needs what every layer was given, which activation checkpointing drops\n"
                "hint: training.memory.activations: keep, or smaller batches"
            )
        if shape.experts and setting.adapter is None:
            return (
                "the gradients of fused experts cannot be told apart by row\n"
                "hint: training.memory.trained: lora"
            )
        return None

    def renew(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        if not targets:
            raise ValueError(
                "greats needs a target whose loss is to fall, and there is none\n"
                "hint: plan with --target"
            )
        model = models.base()
        wanted = trained_matrices(model, self.layers)
        flops = trained_flops(models.shape, adapter_of(model), self.layers)
        directions = []
        for target in targets.values():
            rows = target.tokens[: self.max_target_rows]
            total: Any = 0.0
            for _, gradients in each_batch(model, wanted, rows, meter, flops):
                total = total + gradients.flat().sum(0)
            directions.append((total / len(rows)).float().cpu().numpy())
        return {"target": np.mean(directions, axis=0)}

    def next_round(self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress) -> Round:
        return Round(rows=now.least_drawn(np.arange(len(chosen)), chosen.num_tokens))

    def choose(
        self,
        batch: DrawnWithGradients,
        chosen: Chosen,
        known: Mapping[str, NDArray[Any]],
        random: np.random.Generator,
    ) -> Choice:
        towards, between = batch.products(self.layers, known["target"])
        tokens = batch.num_tokens
        most = self.keep * tokens.sum()
        pull = self.redundancy / max(1.0, self.keep * len(tokens))
        left = np.ones(len(tokens), dtype=bool)
        kept: list[int] = []
        used = 0
        while left.any() and (not kept or used < most):
            worth = towards - pull * between[:, kept].sum(1)
            best = int(np.argmax(np.where(left, worth, -np.inf)))
            left[best] = False
            if kept and used + tokens[best] > most:
                continue
            kept.append(best)
            used += int(tokens[best])
        return Choice(places=np.array(kept, dtype=np.int64))


def _gradients_bytes(shape: ModelShape, setting: MemorySetting) -> float:
    """Of what the backward brought to the linears' outputs, kept until the rows are chosen."""
    widths = sum(
        linear.out_features for i in range(shape.num_layers) for linear in shape.linears_of(i)
    )
    itemsize = 4 if setting.dtype == "float32" else 2
    return float(setting.tokens * (widths + shape.vocab_size) * itemsize)
