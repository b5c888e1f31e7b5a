"""What a model's weight files hold, read from their headers alone, and whether it fits its config.

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, place), and the
tensors. No tensor is read, but for a piece of two that ought to be equal. Compared are vocabulary
and width, the head, the number of layers, and the linears and experts of one layer.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from thrifty.costs.shape import ModelShape

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
LAYERS_BESIDE = {"deepseek_v3"}
"""Families whose files may hold layers beyond the config's: they predict further tokens, and
transformers leaves them out."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"(?:^|\.)experts\.")
_EXPERT = re.compile(r"(?:^|\.)experts\.(?:(\d+)\.)?(?:gate_proj|w1|gate_up_proj)(?:\.weight)?$")
_MOST_HEADER_BYTES = 16 << 20
"""Of a file of 100,000 tensors."""
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Of an element, by the header's name of its kind."""
_COMPARED_BYTES = 1 << 16


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    dtype: str
    """As the header spells it: ``BF16``, ``F32``, ``U8``."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    """Bytes from the start of the file."""


def stored_tensors(folder: Path) -> list[Stored]:
    """Of all safetensors files of a folder. Raises ValueError for one that is damaged or cut."""
    return [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in _header(file)]


def check_weights(folder: Path, shape: ModelShape) -> bool:
    """Whether there are weights. Raises ValueError where they disagree with the config."""
    tensors = stored_tensors(folder)
    if not tensors:
        return False
    head = _find(tensors, HEADS)
    embedding = _find(tensors, EMBEDDINGS)
    expected = (shape.vocab_size, shape.embedding_size)
    for tensor in (embedding, head):
        if tensor is not None and tensor.shape != expected:
            raise _other(tensor, f"vocabulary {expected[0]} and width {expected[1]}")
    if head is None and embedding is not None and not shape.tie_word_embeddings:
        raise ValueError(
            f"the config unties the head from the embedding, but {folder} holds no head\n"
            'hint: set "tie_word_embeddings": true in config.json, or fetch the weights again'
        )
    both = head is not None and embedding is not None
    if both and shape.tie_word_embeddings and _beginning(head) != _beginning(embedding):
        raise ValueError(
            f"the config ties the head to the embedding, but {folder} holds another matrix as its "
            "head, which would be ignored\n"
            'hint: set "tie_word_embeddings": false in config.json'
        )
    # Of a model that also sees, the layers of its language model alone.
    spoken = [tensor for tensor in tensors if "language_model" in tensor.name] or tensors
    layers, complete = _by_layer(spoken), _complete(folder)
    if layers and complete:
        _check_depth(folder, shape, len(layers))
    for index in {0, *sorted(shape.experts.layers if shape.experts else ())[:1]} & set(layers):
        _check_linears(layers[index], shape, index)
        _check_experts(layers[index], shape, index, complete)
    return True


def _by_layer(tensors: Sequence[Stored]) -> dict[int, dict[str, Stored]]:
    """Layer -> the rest of the name -> tensor. Adapters are no weights of a layer."""
    found: dict[int, dict[str, Stored]] = defaultdict(dict)
    for tensor in tensors:
        match = _LAYER.search(tensor.name)
        if match and ".lora_" not in tensor.name:
            found[int(match[1])][match[2]] = tensor
    return found


def _complete(folder: Path) -> bool:
    """Whether all files are there that the folder's index names."""
    index = folder / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True
    return all((folder / str(file)).is_file() for file in files)


def _check_depth(folder: Path, shape: ModelShape, found: int) -> None:
    beside = shape.model_type in LAYERS_BESIDE
    if found < shape.num_layers or (found > shape.num_layers and not beside):
        raise ValueError(
            f"{folder} holds weights of {found} layers, but the config says {shape.num_layers}\n"
            "hint: config.json and weights are of different models, or files are missing"
        )


def _check_linears(stored: dict[str, Stored], shape: ModelShape, index: int) -> None:
    """Sizes of a layer's linears, where they are stored under the names that transformers uses."""
    expected = defaultdict(list)
    for linear in shape.linears_of(index):
        # GPT-2's lie the other way round.
        size = (linear.out_features, linear.in_features)
        expected[linear.name].append(size[::-1] if shape.model_type == "gpt2" else size)
    for name, sizes in expected.items():
        for rest, tensor in stored.items():
            named = rest.split(".")[-2:] == [name, "weight"] and not _EXPERTS.search(rest)
            if named and _unpacked(tensor) and tensor.shape not in sizes:
                raise _other(tensor, " or ".join(f"{rows} x {columns}" for rows, columns in sizes))


def _check_experts(
    stored: dict[str, Stored], shape: ModelShape, index: int, complete: bool
) -> None:
    """Width of the experts, one tensor each or all in one, and where all are there their number."""
    if shape.experts is None or not shape.is_mixture(index):
        return
    wanted, inner = shape.experts.num_experts, shape.experts.intermediate_size
    found = 0
    for match, tensor in _experts(stored):
        if not ({inner, 2 * inner} & set(tensor.shape)):
            raise _other(tensor, f"experts of width {inner}")
        found += 1 if match[1] else tensor.shape[0]
    if complete and found and found != wanted:
        tensor = next(tensor for _, tensor in _experts(stored))
        raise ValueError(
            f"{tensor.file} holds {found} experts a layer, but the config says {wanted}\n"
            "hint: config.json and weights are of different models, or files are missing"
        )


def _experts(stored: dict[str, Stored]) -> Iterator[tuple[re.Match[str], Stored]]:
    for rest, tensor in stored.items():
        match = _EXPERT.search(rest)
        if match and _unpacked(tensor):
            yield match, tensor


def _unpacked(tensor: Stored) -> bool:
    """Whether its shape is the matrix's: integers may hold several weights each."""
    return tensor.dtype.startswith(("F", "BF"))


def _other(tensor: Stored, expected: str) -> ValueError:
    return ValueError(
        f"{tensor.name} in {tensor.file} is {tensor.shape}, but the config says {expected}\n"
        "hint: config.json and weights are of different models"
    )


def _find(tensors: list[Stored], names: tuple[str, ...]) -> Stored | None:
    return next((t for t in tensors if t.name.endswith(names)), None)


def _beginning(tensor: Stored | None) -> bytes:
    assert tensor is not None
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(min(_COMPARED_BYTES, tensor.end - tensor.begin))


def _header(file: Path) -> list[Stored]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            raise _damaged(file, "its header is cut or no header")
        try:
            header = json.loads(stream.read(length))
            tensors = [
                Stored(
                    name,
                    str(entry["dtype"]),
                    tuple(int(n) for n in entry["shape"]),
                    file,
                    8 + length + int(entry["data_offsets"][0]),
                    8 + length + int(entry["data_offsets"][1]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise _damaged(file, "its header cannot be read") from None
    last = max((tensor.end for tensor in tensors), default=8 + length)
    if last > size:
        raise _damaged(file, f"{last:,} bytes are announced, {size:,} are there")
    _check_places(file, tensors, 8 + length)
    return tensors


def _check_places(file: Path, tensors: list[Stored], begin: int) -> None:
    """Each tensor has the bytes that its kind and shape take, one behind another."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        bits = _BITS.get(tensor.dtype)
        if bits is None:
            raise _damaged(file, f"{tensor.name!r:.100} is of a kind that there is not")
        if min(tensor.shape, default=0) < 0 or 8 * (tensor.end - tensor.begin) != bits * prod(
            tensor.shape
        ):
            raise _damaged(file, f"{tensor.name!r:.100} has not the bytes that its shape takes")
        if tensor.begin != begin:
            raise _damaged(file, f"{tensor.name!r:.100} does not begin where another ends")
        begin = tensor.end


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged: {why}\nhint: fetch or copy it again")
