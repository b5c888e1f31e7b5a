"""A stock model whose MLPs have trained inner features beside their own, out of the base model's
files, one file at a time.

Of f inner features and r trained ones, a linear into them gets r rows, [f + r, hidden], zeros in
its bias, and the one that leads out r columns, [hidden, f + r]; where gate and up are one linear,
each half its own rows. Conv1D of GPT-2 has rows and columns the other way round.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from thrifty.costs.shape import ModelShape, read_config, read_shape
from thrifty.signals.model_folder import INDEX, TRAINED

if TYPE_CHECKING:
    Place = tuple[int, str]
    """A layer, and which of the adapter's matrices: ``gate``, ``down`` or ``up``."""

SIZES = {"gpt2": "n_inner", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}
"""What families call the intermediate size in their config."""


def publish(checkpoint: Path, base: Path, folder: Path) -> None:
    """Leave in ``folder`` the model in ``base`` with the adapters of ``checkpoint`` in its MLPs, in
    the dtype that they were trained beside.

    Raises ValueError where the base model's files are not of its layers.
    """
    with safe_open(checkpoint / TRAINED, framework="pt") as file:
        dtype = file.metadata()["dtype"]
    trained = {_place(name): each for name, each in load_file(checkpoint / TRAINED).items()}
    rank = next(each.shape[0] for (_, part), each in trained.items() if part == "down")
    layout, total = _Layout.of(base), 0
    for path in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                tensor = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                tensors[name] = layout.widened(name, tensor, trained, rank)
        total += sum(each.nbytes for each in tensors.values())
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        _write(folder / INDEX, index)
    _write(folder / "config.json", _config(read_config(base), layout.shape, rank, dtype))
    if (base / "generation_config.json").is_file():
        shutil.copy2(base / "generation_config.json", folder)


def features_of(folder: Path, rank: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The last ``rank`` inner features of the model in ``folder``, as adapters called ``names``."""
    layout, found = _Layout.of(folder), {}
    wanted = {_place(name): name for name in names}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                places, axis = layout.of_weight(name)
                if places and name.endswith(".weight"):
                    parts = file.get_tensor(name).chunk(len(places), axis)
                    for place, part in zip(places, parts, strict=True):
                        last = part.narrow(axis, part.shape[axis] - rank, rank)
                        found[wanted[place]] = last.T if layout.transposed else last
    return found


@dataclass(frozen=True)
class _Layout:
    """Which of a model's stored tensors have inner features of an MLP, and where in them."""

    shape: ModelShape
    layers: Mapping[str, int]
    """What the names of an MLP's tensors begin with -> its layer."""

    @classmethod
    def of(cls, folder: Path) -> _Layout:
        shape = read_shape(folder)
        into = next(linear.name for linear in shape.linears if linear.part == "mlp")
        ending = f".{into}.weight"
        layers = {
            name.removesuffix(ending): _number(name)
            for name in _stored(folder)
            if name.endswith(ending)
        }
        if sorted(layers.values()) != list(range(shape.num_layers)):
            raise ValueError(
                f"{folder} has {len(layers)} weights called {into} and {shape.num_layers} layers\n"
                "hint: are its files complete? others than these MLPs cannot be made wider: lora"
            )
        return cls(shape, layers)

    @property
    def transposed(self) -> bool:
        """Its linears are Conv1D."""
        return self.shape.model_type == "gpt2"

    def of_weight(self, name: str) -> tuple[list[Place], int]:
        """Whose features a tensor has, in its order, and along which axis; none: it has none."""
        owner, _, linear = name.rpartition(".")[0].rpartition(".")
        *into, last = (each.name for each in self.shape.linears if each.part == "mlp")
        if owner not in self.layers or linear not in (*into, last):
            return [], 0
        if linear == last:
            columns = name.endswith(".weight")  # its bias is of what it puts out
            return [(self.layers[owner], "up")] * columns, int(not self.transposed)
        parts: tuple[str, ...] = ("gate", "down") if self.shape.gated else ("down",)
        if len(into) > 1:
            parts = (parts[into.index(linear)],)
        axis = int(self.transposed and name.endswith(".weight"))
        return [(self.layers[owner], part) for part in parts], axis

    def widened(
        self, name: str, tensor: torch.Tensor, trained: Mapping[Place, torch.Tensor], rank: int
    ) -> torch.Tensor:
        places, axis = self.of_weight(name)
        if not places:
            return tensor
        joined = []
        for place, part in zip(places, tensor.chunk(len(places), axis), strict=True):
            more = trained[place] if tensor.dim() == 2 else tensor.new_zeros(rank)
            more = more.T if self.transposed and tensor.dim() == 2 else more
            joined += [part, more.to(tensor.dtype)]
        return torch.cat(joined, axis)


def _place(name: str) -> Place:
    return _number(name), name.split(".")[-2]


def _number(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _stored(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def _config(config: dict[str, Any], shape: ModelShape, rank: int, dtype: str) -> dict[str, Any]:
    """Of the wider model."""
    config[SIZES.get(shape.model_type, "intermediate_size")] = shape.intermediate_size + rank
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    assert ModelShape.from_config(config).intermediate_size == shape.intermediate_size + rank
    return config


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
