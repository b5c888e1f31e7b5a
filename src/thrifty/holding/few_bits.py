"""Frozen linears in 4 or 8 bits, as bitsandbytes stores them and transformers loads them.

Stored are the linears that ``costs/`` prices, those of the layers: no head, no router. A linear in
8 bits is made whole for each use, as one in 4 bits is: bitsandbytes' own keeps every input for the
backward, though its weight is frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from thrifty.costs.shape import read_config, read_shape
from thrifty.holding.few_bit_shapes import stored_linears
from thrifty.signals.models import load_model

if TYPE_CHECKING:
    from collections.abc import Callable


def load_nf4(folder: Path, device: str, *, double: bool) -> Any:
    """The model in ``folder`` with its layers' linears in NF4, computing in bfloat16."""
    from transformers import BitsAndBytesConfig

    return load_model(
        folder,
        "bfloat16",
        device,
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=_others(folder),
        ),
    )


def load_int8(folder: Path, device: str) -> Any:
    """The model in ``folder`` with its layers' linears in 8 bits, a float32 scale a row."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_others(folder))
    model = load_model(folder, "bfloat16", device, config)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.forward = _made_whole(module)  # type: ignore[method-assign, assignment]
    return model


def _others(folder: Path) -> list[str]:
    """Paths of the linears that are none of the layers'."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    values = read_config(folder)
    described = AutoConfig.for_model(values.pop("model_type"), **values).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    stored = {linear.name for linear in stored_linears(read_shape(folder))}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name.split(".")[-1] not in stored
    ]


def _made_whole(linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a linear in 8 bits: W = CB * SCB / 127."""

    def whole(dtype: torch.dtype) -> torch.Tensor:
        weight, state = linear.weight, linear.state
        scales = weight.SCB if state.SCB is None else state.SCB
        stored = weight.data if state.CB is None else state.CB
        return stored.to(dtype).mul_((scales / 127.0).unsqueeze(1).to(dtype))

    return lambda x: frozen_linear(x, whole, linear.bias)


def frozen_linear(
    x: torch.Tensor, whole: Callable[[torch.dtype], torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """``x W' + b`` of a W that ``whole`` makes of what is stored, now and again in the backward."""
    bias = None if bias is None else bias.to(x.dtype)
    return _Frozen.apply(x, whole, bias)  # type: ignore[no-any-return]


class _Frozen(torch.autograd.Function):
    """Nothing is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, whole: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.whole = whole
        return functional.linear(x, whole(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.whole(gradient.dtype), None, None
