"""Adapters on a model, as PEFT puts them there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thrifty.costs.operations import Adapter


def with_adapter(
    model: Any,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
    layers: Sequence[int] | None = None,
) -> Any:
    """``model`` itself, its weights frozen and LoRA adapters on the linears named ``targets``, of
    all decoder layers or of those with these places.

    Raises ValueError where there are none of these names.
    """
    from peft import LoraConfig

    places: dict[str, Any] = {"target_modules": list(targets), "task_type": "CAUSAL_LM"}
    if layers is not None:
        places |= {"layers_to_transform": list(layers), "layers_pattern": _layers_name(model)}
    config = LoraConfig(**places, r=rank, lora_alpha=alpha)
    return adapted(model, config, seed)


def _layers_name(model: Any) -> str:
    """Of the list of decoder layers: by itself PEFT would count the innermost list, of experts,
    say."""
    from thrifty.signals.models import layers_of

    layers = layers_of(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    return name.rpartition(".")[2]


def adapted(model: Any, config: Any, seed: int) -> Any:
    """``model`` itself with the adapters of a PEFT configuration, of which those alone are trained.

    Raises ValueError where the configuration's targets match nothing.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)  # adapters begin at random
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # of the Conv1D of GPT-2
            warnings.filterwarnings("ignore", message="PiSSA changes the base")  # saved as LoRA
            return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"no adapter can be put on {', '.join(sorted(config.target_modules))}: {error}\n"
            "hint: the adapter's targets must name linear layers of the model"
        ) from None


def peft_config(
    adapter: Adapter, targets: Sequence[str], scaled_inputs: Sequence[str] = (), **options: Any
) -> Any:
    """PEFT's configuration of what ``costs/`` prices on the linears named ``targets``, of which
    (IA)3 scales the input of ``scaled_inputs``; ``options``: what it does not price."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    places: dict[str, Any] = {"target_modules": list(targets), "task_type": "CAUSAL_LM"}
    if adapter.form == "ia3":
        return IA3Config(**places, feedforward_modules=list(scaled_inputs), **options)
    if adapter.layers is not None:
        places["layers_to_transform"] = list(adapter.layers)
    if adapter.form == "adalora":
        return AdaLoraConfig(**places, init_r=adapter.rank, **options)
    return LoraConfig(**places, r=adapter.rank, use_dora=adapter.form == "dora", **options)


def freeze_inputs(model: Any) -> None:
    """LoRA-FA: of each adapter the matrix that reads the input stays as it began."""
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            weight.requires_grad_(False)


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
    marks = (".lora_", ".ia3_", ".bottleneck.")
    return [w for name, w in model.named_parameters() if any(mark in name for mark in marks)]
