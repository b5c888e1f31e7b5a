"""A small Llama, and optimizers of it made as a training run makes them."""

from __future__ import annotations

from typing import Any

import torch
from tests.costs.tracing import batch, build

from thrifty.core.contracts import OptimizerStates
from thrifty.core.resolve import all_names, method_class, resolve
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape

CONFIG = dict(
    model_type="llama",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    tie_word_embeddings=False,
)
SHAPE = ModelShape.from_config(CONFIG)
DECAY = 0.1
RANK = 8
"""Of those that project."""


def technique(name: str, **options: Any) -> OptimizerStates:
    """With a rank that the matrices have."""
    if hasattr(method_class("states", name), "rank"):
        options.setdefault("rank", RANK)
    return resolve("states", {name: options})


def steps(name: str, dtype: str) -> bool:
    """Whether the technique's optimizer can be stepped here, on weights of a dtype: it may take
    another device, or have no step of its own."""
    if not method_class("states", name).runs:
        return False
    setting, method = MemorySetting(dtype=dtype), technique(name)
    return method.refuses(setting) is None and not method.rewrite(setting).in_backward


RUNNING = [
    (name, dtype)
    for name in all_names("states")
    for dtype in ("float32", "bfloat16")
    if steps(name, dtype)
]
"""Techniques that run, and the dtypes of weights that they train."""


def llama(dtype: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(CONFIG, dtype=dtype)


def groups_of(model: torch.nn.Module, rate: float = 1e-3) -> list[dict[str, Any]]:
    """As transformers' Trainer makes them: no decay of norms."""
    named = list(model.named_parameters())
    return [
        {"params": [p for p in named if p[1].dim() > 1], "lr": rate, "weight_decay": DECAY},
        {"params": [p for p in named if p[1].dim() == 1], "lr": rate, "weight_decay": 0.0},
    ]


def give_gradients(model: torch.nn.Module, seed: int) -> None:
    """Random ones of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = torch.randn(len(parameter), *[1] * (parameter.dim() - 1), generator=generator)
        values = torch.randn(parameter.shape, generator=generator) * size.exp() * 1e-2
        parameter.grad = values.to(parameter.dtype)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Of text that can be learnt."""
    inputs = batch(4, 32)
    inputs["input_ids"] = inputs["labels"] = torch.arange(128).view(4, 32) % 7
    return model(**inputs).loss
