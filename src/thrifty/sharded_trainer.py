"""A ``Trainer`` that trains, saves and goes on where the weights are cut over the ranks.

transformers' own trains a model that was cut as it was read, but neither saves its optimizer nor
goes on from a checkpoint; between the passes of a step it keeps whole gradients, which do not fit
where the weights did not; and it adds up the gradients of adapters in a way that gloo has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from thrifty import ranks


class ShardedTrainer(Trainer):
    """As ever where every rank has the whole model."""

    optimizer: Any
    lr_scheduler: Any

    @property
    def is_cut(self) -> bool:
        return bool(self.is_distributed_loading_by_transformers)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.is_cut:
            return
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        states = self.optimizer.state_dict()  # of all ranks, which are asked for theirs
        if self.args.should_save:
            torch.save(states, folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self._save_rng_state(str(folder))

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """They are added up and cut after each pass."""
        yield

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Adapters, whole on every rank: the same to begin with, and their gradients' means."""
        for weight in model.parameters():
            if not weight.requires_grad or isinstance(weight.data, DTensor):
                continue
            with torch.no_grad():
                dist.broadcast(weight.data, src=0)
            weight.register_post_accumulate_grad_hook(self._mean_gradient)

    def _mean_gradient(self, weight: torch.Tensor) -> None:
        """Of the passes of a step at the last one; a mean again of what was one changes nothing."""
        if self.accelerator.sync_gradients and weight.grad is not None:
            dist.all_reduce(weight.grad)
            weight.grad /= ranks.world()

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
