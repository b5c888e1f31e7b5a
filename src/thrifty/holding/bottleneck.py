"""Bottleneck adapters on a real model: a module beside each layer's MLP, called by hooks on the
MLP's first and last linear, so that every family's own forward stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from thrifty.costs.shape import read_shape
from thrifty.holding.wider_mlp import features_of
from thrifty.signals.model_folder import TRAINED
from thrifty.signals.models import layers_of

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


class Bottleneck(torch.nn.Module):
    """U (act(G x) * (D x)), or U act(D x) without a gate; x: [..., hidden]."""

    def __init__(self, shape: ModelShape, rank: int) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        hidden = shape.hidden_size
        self.gate = torch.nn.Linear(hidden, rank, bias=False) if shape.gated else None
        self.down = torch.nn.Linear(hidden, rank, bias=False)
        self.up = torch.nn.Linear(rank, hidden, bias=False)
        torch.nn.init.zeros_(self.up.weight)
        self.act = ACT2FN[shape.activation]
        self.on = True
        self._read: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.up.weight.dtype)
        if self.gate is None:
            return self.up(self.act(self.down(x)))  # type: ignore[no-any-return]
        return self.up(self.act(self.gate(x)) * self.down(x))  # type: ignore[no-any-return]

    def read(self, into: Any, args: tuple[Any, ...]) -> None:
        """What the MLP reads, until it is done."""
        self._read = args[0] if self.on else None

    def add(self, down: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        x, self._read = self._read, None
        return out if x is None else out + self(x).to(out.dtype)


def with_bottlenecks(model: Any, shape: ModelShape, rank: int, *, dtype: str, seed: int) -> Any:
    """``model`` itself, frozen, with adapters of ``rank`` features and ``dtype`` beside its MLPs.

    ``save_pretrained`` then leaves the adapters alone; ``disable_adapter()`` is a context without
    them, as PEFT has it. Raises ValueError where a layer has no such MLP.
    """
    first, *_, last = (linear.name for linear in shape.linears if linear.part == "mlp")
    torch.manual_seed(seed)
    model.requires_grad_(False)
    for layer in layers_of(model):
        mlp = next((m for m in layer.modules() if hasattr(m, first) and hasattr(m, last)), None)
        if mlp is None:
            raise ValueError(
                f"a layer of {type(model).__name__} has no {first} and {last} to put adapters "
                "beside\nhint: lora; or of a model of several modalities the text part alone"
            )
        into, down = getattr(mlp, first), getattr(mlp, last)
        adapter = Bottleneck(shape, rank).to(down.weight.device, getattr(torch, dtype))
        into.register_forward_pre_hook(adapter.read)
        down.register_forward_hook(adapter.add)
        mlp.bottleneck = adapter
    model.save_pretrained = partial(_save, model)
    model.disable_adapter = partial(_without, model)
    # Or else the Trainer takes weights in few bits for trained ones.
    model._hf_peft_config_loaded = getattr(model, "is_quantized", False)
    return model


def _weights(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if ".bottleneck." in name}


@contextmanager
def _without(model: Any) -> Iterator[None]:
    adapters = [module for module in model.modules() if isinstance(module, Bottleneck)]
    for each in adapters:
        each.on = False
    try:
        yield
    finally:
        for each in adapters:
            each.on = True


def _save(model: Any, folder: Any, *, is_main_process: bool = True, **_: Any) -> None:
    """The adapters, and the dtype that the model's own weights are held in."""
    if not is_main_process:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in _weights(model).items()}
    dtype = str(model.dtype).removeprefix("torch.")
    save_file(tensors, Path(folder) / TRAINED, metadata={"format": "pt", "dtype": dtype})


@torch.no_grad()
def restore(model: Any, folder: Path) -> None:
    """Give ``model`` the adapters that a checkpoint holds, or the model that a run left; where that
    is the base model none are there, and it keeps those that add nothing.

    Raises ValueError where they are of another rank, or of another model.
    """
    own = _weights(model)
    if (folder / TRAINED).is_file():
        saved = load_file(folder / TRAINED)
    else:
        more = read_shape(folder).intermediate_size
        more -= read_shape(Path(model.name_or_path)).intermediate_size
        if not more:
            return
        saved = features_of(folder, more, own)
    alike = {name: weight.shape for name, weight in saved.items()}
    if alike != {name: weight.shape for name, weight in own.items()}:
        raise ValueError(
            f"{folder} holds adapters of other sizes than training.memory.trained has\n"
            "hint: undo the edit, or delete that folder to train anew"
        )
    for name, weight in own.items():
        weight.copy_(saved[name])
