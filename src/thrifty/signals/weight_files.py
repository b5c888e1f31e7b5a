"""What a model's weight files hold, read from their headers alone, and whether it fits its config.

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, place), and the
tensors. No tensor is read, but for a piece of two that ought to be equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from thrifty.costs.shape import ModelShape

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
_MOST_HEADER_BYTES = 100_000_000
_COMPARED_BYTES = 1 << 16


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
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
            raise ValueError(
                f"{tensor.name} in {tensor.file} is {tensor.shape}, but the config says "
                f"vocabulary {expected[0]} and width {expected[1]}\n"
                "hint: config.json and weights are of different models"
            )
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
    return True


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
                    tuple(int(n) for n in entry["shape"]),
                    file,
                    8 + length + int(entry["data_offsets"][0]),
                    8 + length + int(entry["data_offsets"][1]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise _damaged(file, "its header cannot be read") from None
    last = max((tensor.end for tensor in tensors), default=8 + length)
    if last > size:
        raise _damaged(file, f"{last:,} bytes are announced, {size:,} are there")
    return tensors


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged: {why}\nhint: fetch or copy it again")
