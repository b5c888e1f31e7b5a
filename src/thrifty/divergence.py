"""Divergence in training: a loss or gradient that is not finite, seen before the optimizer is."""

from __future__ import annotations

from typing import Any

import torch


class NonFiniteGradient(RuntimeError):
    """A loss or gradient became infinite or not a number; raised before the optimizer step."""

    @classmethod
    def at(cls, step: int, what: str = "gradient") -> NonFiniteGradient:
        return cls(
            f"the {what} at step {step} is not finite; nothing was updated\n"
            "hint: the last checkpoint is good; go on from it at a lower learning rate, or look at "
            "the batch"
        )


class FiniteGuard:
    """Watches the training losses of ``model`` as it runs, and its gradients when asked."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._all_finite: Any = None
        self._hook = model.register_forward_hook(self._see_output)

    def _see_output(self, module: Any, args: Any, output: Any) -> None:
        """Remember whether a training loss was finite, without waiting for the device."""
        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            finite = torch.isfinite(loss.detach()).all()
            self._all_finite = finite if self._all_finite is None else self._all_finite & finite

    def check(self, step: int) -> None:
        """Before the optimizer takes ``step``: raise NonFiniteGradient for what it must not see."""
        if self._all_finite is not None and not bool(self._all_finite):
            raise NonFiniteGradient.at(step, "loss")
        self._all_finite = None
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        if gradients and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            raise NonFiniteGradient.at(step)

    def detach(self) -> None:
        self._hook.remove()
