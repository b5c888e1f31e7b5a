"""Adapters that begin as a part of the weights, which is read from the base model's files again.

The best approximation of a matrix D of rank r is its first r singular directions; split evenly,
s B A = U S V' with B = U (S / s)^(1/2) and A = (S / s)^(1/2) V'.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

ADAPTER = "default"


@torch.no_grad()
def begin_with_what_is_lost(model: Any) -> None:
    """Set each LoRA adapter of ``model`` to what its linear, in few bits, has lost of the weight in
    the base model's files."""
    from peft.utils.integrations import dequantize_module_weight

    for path, layer, weight in _adapted_linears(model):
        held = dequantize_module_weight(layer.get_base_layer()).float()
        a, b = _factors(weight.to(held) - held, layer.r[ADAPTER], layer.scaling[ADAPTER])
        assert a.shape == layer.lora_A[ADAPTER].weight.shape, path
        layer.lora_A[ADAPTER].weight.copy_(a)
        layer.lora_B[ADAPTER].weight.copy_(b)


@torch.no_grad()
def save_on_the_base(model: Any, folder: Path) -> None:
    """Save the LoRA adapters of ``model``, whose weights gave up a part of rank r, as adapters of
    rank 2 r on the weights as they are in the base model's files: s (B A - B0 A0)."""
    from safetensors.torch import save_file

    tensors = {}
    for path, layer, weight in _adapted_linears(model):
        held = layer.get_base_layer().weight.float()
        given = weight.to(held.device).to(layer.get_base_layer().weight.dtype).float() - held
        given = given.T if layer.fan_in_fan_out else given
        a0, b0 = _factors(given, layer.r[ADAPTER], layer.scaling[ADAPTER])
        a, b = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
        place = f"base_model.model.{path}"
        tensors[f"{place}.lora_A.weight"] = torch.cat([a, a0]).contiguous().cpu()
        tensors[f"{place}.lora_B.weight"] = torch.cat([b, -b0], dim=1).contiguous().cpu()
    config = deepcopy(model.peft_config[ADAPTER])
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.init_lora_weights, config.inference_mode = True, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _factors(matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A, [rank, in], and B, [out, rank], of which scale B A is nearest to ``matrix``."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _adapted_linears(model: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Path in the base model, PEFT's layer, and the weight as it is in the model's files."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    found = _stored(Path(base.name_or_path), {f"{path}.weight" for path in layers})
    for name, weight in found:
        path = name.removesuffix(".weight")
        yield path, layers[path], weight


def _stored(folder: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of these names in a model's files, one at a time. Raises ValueError where one is
    not there."""
    from safetensors import safe_open

    missing = set(names)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(missing.intersection(weights.keys())):
                missing.remove(name)
                yield name, weights.get_tensor(name)
    if missing:
        raise ValueError(
            f"{folder} has no weight {min(missing)}\n"
            "hint: an adapter that begins as a part of the weights needs their files: use lora"
        )
