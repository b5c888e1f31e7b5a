"""Layers that keep little and run again in the backward, as transformers checkpoints them.

Not reentrant: arXiv:1604.06174, a decoder layer at a time. It acts while the model is in training
mode alone.
"""

from __future__ import annotations

from typing import Any

from thrifty.signals.models import layers_of


def plain_model(model: Any) -> Any:
    """The model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(plain: Any) -> tuple[str, Any]:
    """The part that makes hidden states, all layers in it, and its name in ``plain``."""
    layers = layers_of(plain)
    holds = ((name, part) for name, part in plain.named_children() if layers in part.modules())
    return next(holds)


def recompute(model: Any, *, every: int = 1, selective: bool = False) -> None:
    """Have every ``every``-th layer of ``model`` run again in its backward, from its input alone;
    ``selective``: what its products and attention put out is kept as well.

    Raises ValueError where the family has no layers that can.
    """
    plain = plain_model(model)
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = selective_contexts
    if not getattr(plain, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"layers of {type(plain).__name__} cannot run again in the backward\n"
            "hint: keep their activations, or offload them"
        )
    if selective and any(
        getattr(module, "has_bias", False) for module in layers_of(plain).modules()
    ):
        raise ValueError(
            f"experts of {type(plain).__name__} add a bias to a product in place, which cannot be "
            "kept for their backward\nhint: recompute whole layers"
        )
    plain.activation_checkpointing_enable(options, every_n_layers=every)


def selective_contexts() -> Any:
    """For a checkpoint that keeps what products and attention put out (arXiv:2205.05198)."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products = _products()

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in products
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _products() -> set[Any]:
    """Operations that multiply matrices, those of attention's fused kernels included."""
    import torch

    aten = torch.ops.aten
    return {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
