"""Memory techniques as they run on fake tensors, for the step that ``fake_step`` traces.

Each as its usual implementation has it: torch's own AdamW and SGD, transformers' Adafactor,
checkpoints that keep products, a head in checkpointed chunks, hooks that use a gradient up. Two are
stand-ins: weights in few bits are packed bytes that each use makes whole (bitsandbytes has no fake
kernels), and Lion is SGD with momentum, one moment as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from thrifty.costs.setting import ADAMW, MemorySetting, Storage
from thrifty.costs.shape import ModelShape

STATES = ("adamw", "adafactor", "adalomo", "lion", "lomo", "sgd")
"""The optimizers that can be traced."""

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
}


def optimizer_of(parameters: Iterable[torch.nn.Parameter], setting: MemorySetting) -> Any:
    name = setting.states.name
    if setting.states == ADAMW:
        foreach = None if setting.fused else setting.device_kind == "cuda"
        return torch.optim.AdamW(parameters, lr=1e-4, fused=setting.fused, foreach=foreach)
    if name in ("adafactor", "adalomo"):
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=1e-4, scale_parameter=False, relative_step=False, warmup_init=False
        )
    momentum = 0.9 if name == "lion" else 0.0
    # In place either way, and the fused kernel has no fake form: it would run on real memory.
    return torch.optim.SGD(parameters, lr=1e-4, momentum=momentum, foreach=False)


def update_in_backward(optimizers: dict[torch.nn.Parameter, Any]) -> None:
    """Each weight by its own optimizer as soon as its gradient is there, which then goes."""

    def update(parameter: torch.nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)


def selective_contexts() -> Any:
    """For a checkpoint that keeps what products and attention put out."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in _PRODUCTS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def chunked_loss(model: Any, labels: torch.Tensor, inputs: dict[str, Any], chunk: int) -> Any:
    """The head and the loss of ``chunk`` tokens at a time, run again in the backward."""
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)

    def loss(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head(rows)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return functional.cross_entropy(logits.float(), wanted, reduction="sum")

    hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    pairs = zip(hidden.split(chunk), labels.flatten().split(chunk), strict=True)
    return sum(checkpoint(loss, *pair, use_reentrant=False) for pair in pairs) / labels.numel()


def offload(decoder: torch.nn.Module, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What the decoder keeps for its backward waits on the host, to which ``copy`` copies it;
    weights stay where they are."""
    resident = {p.untyped_storage()._cdata for p in decoder.parameters()}
    forward = decoder.forward

    def pack(tensor: torch.Tensor) -> tuple[bool, torch.Tensor]:
        stays = tensor.untyped_storage()._cdata in resident
        return stays, tensor if stays else copy(tensor)

    def unpack(packed: tuple[bool, torch.Tensor]) -> torch.Tensor:
        stays, tensor = packed
        return tensor if stays else tensor.clone()

    def offloading(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    decoder.forward = offloading  # type: ignore[method-assign]


def perturb(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Noise for one weight after the other."""
    for parameter in parameters:
        parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)


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
