"""A ``Trainer`` whose optimizer may want losses in place of gradients: of whole batches, or of the
long packs in them, beside a gradient of the short ones.
"""

from __future__ import annotations

from typing import Any

from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.data.two_lengths import cut_at, num_labels
from thrifty.piecewise_trainer import PiecewiseTrainer
from thrifty.training_job import TrainingJob


class ZerothOrderTrainer(PiecewiseTrainer):
    """Where the optimizer has ``estimate`` (``Trainable.optimizer``), it is asked."""

    job: TrainingJob
    budget: BudgetCallback
    optimizer: Any

    def make_pass(self, model: Any, inputs: Any, num_items: Any) -> Any:
        estimate, short = getattr(self.inner_optimizer, "estimate", None), self.job.setting.short
        if estimate is None:
            return super().make_pass(model, inputs, num_items)
        inputs = self._prepare_inputs(inputs)
        if not short:
            return self._estimated(estimate, inputs, num_items)
        # In this order, for the backward moves the weights.
        first, other = cut_at(short, inputs)
        beside = self._estimated(estimate, other, num_labels(other))
        return super().make_pass(model, first, num_labels(first)) / 2 + beside / 2

    def _estimated(self, estimate: Any, inputs: Any, num_items: Any) -> Any:
        """A micro-batch of which the optimizer needs losses alone."""
        self.model.eval()  # the same weights drop out on both sides of a direction: none
        loss = estimate(
            lambda: self.compute_loss(self.model, inputs, num_items_in_batch=num_items).detach()
        )
        self.budget.count(Cost(tokens=float(inputs["input_ids"].numel())))
        return loss

    @property
    def inner_optimizer(self) -> Any:
        """Without what accelerate puts around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)
