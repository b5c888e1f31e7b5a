"""AdaLoRA while it trains: which singular values stay, and a pull of their directions apart.

Of each adapter weight w with its gradient g, the averages (arXiv:2303.10512, section 3.2)

    s <- 0.85 s + 0.15 |w g|,    u <- 0.85 u + 0.15 ||w g| - s|

make its importance s u; a singular value has its own and the means of both its directions. PEFT's
allocator sets the least important of all matrices to zero, ever more of them until the last cut;
those that are zero then stay so. The averages lie among the optimizer's states, so that a
checkpoint has them.

PEFT adds gamma / n (sum |A A' - 1| + sum |B' B - 1|) to each loss that the model returns, those of
evaluations and once a micro-batch. Here its gradient is added to the adapters' once a step, after
they were clipped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

AVERAGES = ("importance", "uncertainty")
"""Names of s and u in the optimizer's state of a weight."""


class Ranks:
    """The singular values of a PEFT model whose ``base_model`` is an ``AdaLoraModel``."""

    def __init__(self, model: Any) -> None:
        self.inner = model.base_model
        self.inner.forward = partial(_plain_forward, self.inner)
        self.config = model.peft_config[self.inner.trainable_adapter_name]
        # PEFT (0.21) has this number require a gradient where it casts it, as on bfloat16 weights.
        for _, number in self._named("ranknum"):
            number.requires_grad_(False)
        self._optimizer: Any = None
        self._step = 0
        self._dropped: list[torch.Tensor] = []
        self._moves = True

    def follow(self, optimizer: Any, step: int) -> None:
        """Before each step, the first 0: have the optimizer pull and cut at its end."""
        self._step = step
        if self._optimizer is not optimizer:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)
            self._optimizer = optimizer

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._step >= self.config.total_step:
            self._dropped = [values == 0 for _, values in self._named("lora_E")]
        # A step that is passed over had no backward.
        self._moves = all(each.grad is not None for _, each in self._named("lora_"))
        if not self._moves:
            return
        right = [(each, each.grad) for _, each in self._named("lora_A")]
        left = [(each.mT, each.grad.mT) for _, each in self._named("lora_B")]
        share = self.config.orth_reg_weight / len(right + left)
        for directions, gradient in right + left:
            gradient.add_(pull(directions), alpha=share)

    @torch.no_grad()
    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        done, last = self._step + 1, self.config.total_step
        if done > last:
            for (_, values), dropped in zip(self._named("lora_E"), self._dropped, strict=True):
                values.masked_fill_(dropped, 0.0)
            return
        if done < last and self._moves:
            for _, weight in self._named("lora_"):
                self._average(weight, optimizer.state[weight])
        budget, cuts = self.inner.rankallocator.budget_schedule(done)
        if cuts or done == last:
            self._cut(optimizer, budget)
        if done == last:
            for _, weight in self._named("lora_"):
                for key in AVERAGES:
                    del optimizer.state[weight][key]

    def _average(self, weight: torch.Tensor, state: dict[str, Any]) -> None:
        for key in AVERAGES:
            if key not in state:
                state[key] = torch.zeros_like(weight)
            elif state[key].device != weight.device:  # an optimizer on the host loaded it
                state[key] = state[key].to(weight.device)
        mean, spread = (state[key] for key in AVERAGES)
        assert weight.grad is not None
        now = (weight * weight.grad).abs_()
        mean.mul_(self.config.beta1).add_(now, alpha=1 - self.config.beta1)
        spread.mul_(self.config.beta2).add_(now.sub_(mean).abs_(), alpha=1 - self.config.beta2)

    def _cut(self, optimizer: Any, budget: int) -> None:
        """Of all singular values set to zero those that are not among the ``budget`` most
        important."""
        allocator = self.inner.rankallocator
        states = {name: optimizer.state[weight] for name, weight in self._named("lora_")}
        allocator.exp_avg_ipt = {name: state[AVERAGES[0]] for name, state in states.items()}
        allocator.exp_avg_unc = {name: state[AVERAGES[1]] for name, state in states.items()}
        allocator.mask_to_budget(self.inner.model, budget)
        allocator.reset_ipt()

    def _named(self, part: str) -> list[tuple[str, Any]]:
        """Adapter weights whose names have ``part`` in them, by their names in the base model."""
        named = self.inner.model.named_parameters()
        return [(name, weight) for name, weight in named if f".{part}" in name]


def pull(directions: torch.Tensor) -> torch.Tensor:
    """The gradient of |A A' - 1|, Frobenius' norm, with respect to A, [rank, n]."""
    products = directions @ directions.mT
    products.diagonal().sub_(1.0)
    size = products.norm().clamp_min_(torch.finfo(products.dtype).tiny)
    return (products @ directions).mul_(2.0 / size)


def _plain_forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
    """That of ``AdaLoraModel`` without what it adds to the loss."""
    return inner.model(*args, **kwargs)
