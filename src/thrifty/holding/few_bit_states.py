"""Optimizers whose states have 8 or 4 bits, by the libraries that keep them.

bitsandbytes: codes of 8 bits, blocks of 256 sharing a scale; tensors of fewer than 4096 elements
stay float32. torchao: codes of 4 bits, blocks of 128; the same of small tensors, in their dtype.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from thrifty.costs.shape import ModelShape
from thrifty.holding.lion import LION_BETAS
from thrifty.holding.tensor_by_tensor import BETAS, EPS, in_a_layer, named

HEADS = {"lm_head", "embed_out"}
"""What transformers calls the output matrix."""


def adamw_8bit(groups: list[dict[str, Any]], shape: ModelShape) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit, the embedding's moments in 32 bits."""
    library = _library("bitsandbytes", "adamw_8bit")
    optimizer = library.optim.AdamW8bit(groups, betas=BETAS, eps=EPS)
    return _with_wide_embedding(optimizer, shape, library.optim.GlobalOptimManager)


def lion_8bit(groups: list[dict[str, Any]], shape: ModelShape) -> torch.optim.Optimizer:
    """bitsandbytes' Lion8bit, the embedding's moment in 32 bits."""
    library = _library("bitsandbytes", "lion_8bit")
    optimizer = library.optim.Lion8bit(groups, betas=LION_BETAS)
    return _with_wide_embedding(optimizer, shape, library.optim.GlobalOptimManager)


def adamw_4bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torchao's AdamW4bit. Its first step compiles, which takes a C++ compiler."""
    optimizer = _library("torchao.optim", "adamw_4bit").AdamW4bit(groups, betas=BETAS, eps=EPS)

    def rates_to_tensors(optimizer: Any, args: Any, kwargs: Any) -> None:
        # It takes nothing else, and whoever sets a group's rate anew sets a number.
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)

    optimizer.register_step_pre_hook(rates_to_tensors)
    return optimizer  # type: ignore[no-any-return]


def _with_wide_embedding(optimizer: Any, shape: ModelShape, manager: Any) -> Any:
    """As transformers' Trainer has it for ``nn.Embedding``. The optimizer gets a manager of its
    own: the library's knows weights by addresses, which others have after them."""
    own = manager.__new__(manager)
    own.initialize()
    for number, group in enumerate(optimizer.param_groups):
        for place, (name, parameter) in enumerate(named(group)):
            if _is_embedding(name, parameter, shape):
                own.index2config[number, place] = {"optim_bits": 32}
    optimizer.mng = own
    return optimizer


def _is_embedding(name: str, parameter: torch.Tensor, shape: ModelShape) -> bool:
    """Of tokens or positions; a head that is not tied is none."""
    if in_a_layer(name) or parameter.dim() != 2 or HEADS & set(name.split(".")):
        return False
    return parameter.shape[1] in (shape.embedding_size, shape.hidden_size)


def _library(module: str, technique: str) -> Any:
    """Raises ValueError where it is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"{technique} needs the package {package}, which is not installed\n"
            f"hint: pip install 'thrifty[{package}]', or choose other states"
        ) from None
