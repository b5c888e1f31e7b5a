"""LoRA adapters on a model, as PEFT puts them there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


def with_adapter(model: Any, targets: Sequence[str], rank: int, alpha: float, seed: int) -> Any:
    """``model`` itself, its weights frozen and adapters on the linears named ``targets``.

    Raises ValueError where there are none of these names.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)  # adapters begin at random
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"no adapter can be put on {', '.join(targets)}: {error}\n"
            "hint: training.lora.targets must name linear layers of the model"
        ) from None


def sharing_copy(model: Any) -> Any:
    """A model of its own modules on the same weights, frozen, to put adapters on: no bytes more."""
    import torch

    frozen = {
        id(weight): torch.nn.Parameter(weight.detach(), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, {**frozen, **{id(buffer): buffer for buffer in model.buffers()}})


def adapter_weights(model: Any) -> list[Any]:
    """Of the adapters on ``model``, in its order."""
    return [weight for name, weight in model.named_parameters() if "lora_" in name]
