"""Influence along a LoRA warm-up: what a row's gradient does to the target's, through curvature.

    score(z, target) = < g(z), P mean over v in target of g(v) >

P is an inverse curvature made from a sample of the pool's gradients. The target is known, so that P
goes to its mean gradient, once; a row then costs an inner product with its exact gradient, of which
nothing is stored. Where influence is of the model's output f = log(p / (1 - p)), p = exp(-L), in
place of the loss L (TRAK, arXiv:2303.14186), grad f = -grad L / (1 - p), and

    score(z, target) = mean over i of (1 - p_i(z))  *  mean over i of < grad f_i(z), P_i grad f_i >

over the warm-up's checkpoints i, the paper's average over an ensemble.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Tokens, Work
from thrifty.core.ranges import check_ranges
from thrifty.signals.beside import Beside, decompositions_cost
from thrifty.signals.curvature import Sizes, adapter_sizes, num_elements
from thrifty.signals.example_gradients import BatchGradients
from thrifty.signals.forward import shape_of
from thrifty.signals.trajectories import drawn_examples
from thrifty.signals.warm_scorer import WarmedUp
from thrifty.signals.warm_up import WarmUp, features_cost

Passes = Iterator[Iterator[BatchGradients]]
"""Over the sample, one after the other, as many as were said to be made."""


@dataclass(frozen=True)
class Curving:
    """What making P and its products with the targets takes."""

    passes: tuple[Beside, ...]
    """Over the sample, and what is made of its gradients in each."""
    once: float
    """FLOPs of what does not depend on the sample's tokens."""
    held_bytes: float


@dataclass(frozen=True, kw_only=True)
class InfluenceScorer(WarmedUp):
    """Inner products of rows' gradients with the target's, under a metric of the pool's."""

    max_curvature_rows: int = 1_000
    """Rows of the pool that the curvature is made from, drawn at random, of the warm-up's first."""
    damping: float = 0.1
    """Added to the curvature, times its mean eigenvalue."""

    every_checkpoint: ClassVar[bool] = False
    """An ensemble of the warm-up's checkpoints; otherwise the last alone."""
    of_output: ClassVar[bool] = False
    """Influence on log(p / (1 - p)), not on the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, max_curvature_rows=(1, inf), damping=(1e-6, inf))

    @property
    def sketch_dimensions(self) -> int:
        """Of the warm-up's sketch, where there is one."""
        return 0

    @abstractmethod
    def curving(self, sizes: Sizes, num_rows: int, num_targets: int) -> Curving:
        """Of matrices of these sizes and a sample of so many rows."""

    @abstractmethod
    def through_curvature(
        self, warm: WarmUp, towards: Sequence[Any], passes: Passes
    ) -> Sequence[Any]:
        """P times the targets' mean gradients, ``[num_targets, elements]`` of each weight."""

    @property
    def _numbers(self) -> range:
        return range(0 if self.every_checkpoint else self.epochs - 1, self.epochs)

    def cost(self, work: Work) -> Cost:
        shape = shape_of(work, self.model)
        sizes = adapter_sizes(shape, self.adapter(shape))
        sample = work.pool.part(min(1.0, self.max_curvature_rows / max(work.pool.num_examples, 1)))
        curving = self.curving(sizes, sample.num_examples, len(work.targets))
        each = decompositions_cost(work, curving.once)
        for stats in self._shown_stats(work):
            each += self._pass_cost(work, stats, _products(sizes, 1))
        for beside in curving.passes:
            each += self._pass_cost(work, sample, beside)
        each += self._pass_cost(work, work.pool, _products(sizes, len(work.targets)))
        total = self._warm_up_cost(work) + each * len(self._numbers)
        directions = 4.0 * num_elements(sizes) * len(work.targets) * len(self._numbers)
        held = curving.held_bytes + directions
        return replace(total, peak_memory_bytes=total.peak_memory_bytes + held)

    def _pass_cost(self, work: Work, stats: Any, beside: Beside) -> Cost:
        adapter = self.adapter(shape_of(work, self.model))
        return features_cost(work, stats, adapter, self.model, beside)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> tuple[WarmUp, Models, dict[int, Sequence[Any]]]:
        """The warm-up, its model's tokenizer, and of each checkpoint that counts the targets' mean
        gradients through the curvature, ``[num_targets, elements]`` of each weight."""
        own = models.other(self.model)
        warm = self._warm_up(pool, own, meter, self.sketch_dimensions)
        _, sample = drawn_examples(pool, own, self.max_curvature_rows, self.seed)
        shown = self._shown(targets, own)
        sizes = [(weight.shape[0], weight.shape[1]) for weight in warm.weights]
        curving = self.curving(sizes, len(sample), len(shown))
        directions = {}
        for number in self._numbers:
            towards = self._mean_gradients(warm, shown, number, meter, sizes)
            passes = (
                (gradients for _, gradients in warm.gradients(sample, number, meter, beside))
                for beside in curving.passes
            )
            directions[number] = self.through_curvature(warm, towards, passes)
            meter.tick(Cost(flops=curving.once))
        return warm, own, directions

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        warm, own, directions = state
        examples = own.tokens(shard)
        sizes = [(weight.shape[0], weight.shape[1]) for weight in warm.weights]
        num_targets = len(directions[self.epochs - 1][0])
        found = np.zeros((len(shard), num_targets))
        doubts = np.zeros((len(shard), 1))
        for number, towards in directions.items():
            beside = _products(sizes, num_targets)
            for places, gradients in warm.gradients(examples, number, meter, beside):
                doubt = self._doubt(gradients)[:, None]
                found[places] += (gradients.products(towards) / doubt).cpu().numpy()
                doubts[places] += doubt.cpu().numpy()
        return (found / len(directions) * doubts / len(directions)).astype(np.float32)

    def _mean_gradients(
        self,
        warm: WarmUp,
        shown: Sequence[Sequence[Tokens]],
        number: int,
        meter: Meter,
        sizes: Sizes,
    ) -> list[Any]:
        """Of each target, ``[num_targets, elements]`` of each weight."""
        import torch

        means = []
        for rows in shown:
            total: list[Any] = [0.0] * len(sizes)
            for _, gradients in warm.gradients(rows, number, meter, _products(sizes, 1)):
                each_counts = 1 / (len(rows) * self._doubt(gradients))
                for place, part, each in gradients.weights():
                    total[place] = total[place] + each_counts[part] @ each
            means.append(total)
        return [torch.stack(each) for each in zip(*means, strict=True)]

    def _doubt(self, gradients: BatchGradients) -> Any:
        """[batch], by which a gradient of the loss is divided to be one of what influence is on, up
        to its sign: 1 - p, or 1."""
        if not self.of_output:
            return gradients.losses.new_ones(len(gradients))
        return doubt(gradients)


def doubt(gradients: BatchGradients) -> Any:
    """[batch]: 1 - p, p = exp(-L), away from zero (a row without loss has no gradient)."""
    return (-gradients.losses.neg().expm1()).clamp_min(1e-6)


def _products(sizes: Sizes, num_targets: int) -> Beside:
    """Inner products of an example's gradient with directions, or its part in a mean."""
    return Beside(per_example=2.0 * num_targets * num_elements(sizes))
