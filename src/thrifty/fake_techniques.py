"""Memory techniques as they run on fake tensors, for the step that ``fake_step`` traces.

They are traced as a run has them, but for weights in few bits: packed bytes that each use makes
whole, as bitsandbytes has no fake kernels. Neither have its optimizers, nor torchao's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from thrifty.core.resolve import method_class
from thrifty.costs.setting import ADAMW, MemorySetting, Storage
from thrifty.costs.shape import ModelShape

STATES = (
    "adafactor",
    "adalomo",
    "adam_mini",
    "adamw",
    "adamw_bf16",
    "apollo",
    "galore",
    "lion",
    "lomo",
    "sgd",
)
"""The optimizers that can be traced."""


def optimizer_of(
    named: list[tuple[str, torch.nn.Parameter]], setting: MemorySetting, shape: ModelShape | None
) -> Any:
    """That of a run, but that AdamW need not be fused. Its states exist from here on, and the
    gradients that they are of."""
    group = {"params": named, "lr": 1e-4, "weight_decay": 0.0}
    states = setting.states
    if states == ADAMW:
        foreach = None if setting.fused else setting.device_kind == "cuda"
        optimizer: Any = torch.optim.AdamW([group], fused=setting.fused, foreach=foreach)
    else:
        options = {"rank": states.rank} if states.rank else {}
        technique: Any = method_class("states", states.name)(**options)
        optimizer = technique.optimizer([group], shape)
    with torch.no_grad():
        for name, weight in named:
            gradient = torch.empty_like(weight)
            if setting.in_backward:
                optimizer.update(name, weight, gradient, optimizer.param_groups[0])
            else:
                weight.grad = gradient
    if not setting.in_backward:
        optimizer.step()
    return optimizer


# -- weights in few bits --------------------------------------------------------------------------


def pack_linears(layers: Iterable[torch.nn.Module], shape: ModelShape, storage: Storage) -> None:
    """Have the linears of the layers, adapted or not, hold packed bytes."""
    for index, layer in enumerate(layers):
        linears = {linear.name: linear for linear in shape.linears_of(index)}
        for module in list(layer.modules()):
            for name, child in module.named_children():
                inner = getattr(child, "base_layer", child)
                if name in linears and getattr(inner, "weight", None) is not None:
                    _pack(inner, round(storage.bytes_of(linears[name])))


def _pack(linear: Any, num_bytes: int) -> None:
    whole, transposed = linear.weight.shape, not isinstance(linear, torch.nn.Linear)
    packed = torch.empty(num_bytes, dtype=torch.uint8, device=linear.weight.device)
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    linear.forward = partial(_run_packed, linear, whole[::-1] if transposed else whole)


def _run_packed(linear: Any, whole: torch.Size, x: torch.Tensor) -> torch.Tensor:
    return _Packed.apply(x, linear.weight, linear.bias, whole)  # type: ignore[no-any-return]


class _Packed(torch.autograd.Function):
    """A frozen linear whose weight is made whole for the forward and again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, packed: Any, bias: Any, whole: torch.Size) -> torch.Tensor:
        ctx.whole = whole
        return functional.linear(x, x.new_empty(whole), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.whole), None, None, None
