"""What a model folder may hold: files that somebody else wrote, looked at before they are loaded.

Refused are links and names that lead out of the folder (the hub's cache links its own),
weight indexes that name anything but files beside them, an adapter within a model's own folder,
which transformers would put on it unasked, and files far larger than their names say they are.
Pickled weights and a repository's own code are never read: the loaders are told so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
TRAINED = "trained.safetensors"
"""In a checkpoint: what was trained alone, where no stock library puts it on a model."""
_READ = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "chat_templates/*")
"""What is read of a folder."""
MOST_BYTES = {"config.json": 16 << 20, "tokenizer_config.json": 64 << 20, INDEX: 64 << 20}
MOST_TOKENIZER_BYTES = 256 << 20
"""Of every other file but the weights; the largest tokenizers known have 40 MB."""


def check_folder(folder: Path) -> None:
    """Raises ValueError for a file that leads out of the folder, or is too large to be read."""
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        if path.is_symlink():
            _check_link(path, folder)
        most = MOST_BYTES.get(path.name, MOST_TOKENIZER_BYTES)
        if path.suffix != ".safetensors" and path.is_file() and path.stat().st_size > most:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes; the most that is read is {most:,}\n"
                "hint: this is not what its name says; fetch the model again"
            )
    for name in _names_in(folder / "tokenizer_config.json", "fast_tokenizer_files", list):
        _check_name(folder / "tokenizer_config.json", name)


def check_index(folder: Path) -> None:
    """Raises ValueError for a weight index that is none, or names files outside its folder."""
    for name in _names_in(folder / INDEX, "weight_map", dict):
        _check_name(folder / INDEX, name)


def check_no_adapter(folder: Path) -> None:
    """Raises ValueError where a model's folder has an adapter in it."""
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} holds a model and an adapter ({ADAPTER})\n"
            "hint: merge them (PEFT's merge_and_unload), or move the adapter elsewhere"
        )


def base_of_adapter(folder: Path) -> str:
    """The model that an adapter is put on: a hub name, or a path that leads nowhere by itself.

    Raises ValueError for one that is named by neither.
    """
    file = folder / ADAPTER
    base = _object(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{file} names no base model\nhint: base_model_name_or_path says what it is put on"
        )
    odd = not isinstance(base, str) or "://" in base or "\\" in base or "\0" in base
    if odd or ".." in Path(base).parts or base.startswith("~") or base[1:2] == ":":
        raise ValueError(
            f"{file} names {base!r:.200} as its base model, which is no plain path or hub name\n"
            "hint: do not use this adapter, or set base_model_name_or_path to where the model is"
        )
    return str(base)


def _check_link(path: Path, folder: Path) -> None:
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":  # of the hub's cache
        homes.append(folder.parent.parent.resolve() / "blobs")
    target = path.resolve()
    if not any(home in target.parents for home in homes):
        raise ValueError(
            f"{path} is a link out of its folder, to {target}\n"
            "hint: do not use a model that came so; of your own files, put a copy there instead"
        )


def _check_name(file: Path, name: Any) -> None:
    plain = isinstance(name, str) and name == Path(name).name and not set(name) & set("/\\:\0")
    if not plain or name in ("", ".", ".."):
        raise ValueError(
            f"{file} points outside its folder: {name!r:.200}\nhint: do not use this model"
        )


def _names_in(file: Path, key: str, kind: type[Any]) -> list[Any]:
    """The values of a JSON file's list or object, each once; none where it is not there."""
    if not file.is_file():
        return []
    found = _object(file).get(key, kind())
    if not isinstance(found, (dict, list)) or not isinstance(found, kind):
        raise ValueError(f"{file}: {key} names no files\nhint: fetch the model again")
    values = list(found.values()) if isinstance(found, dict) else list(found)
    return list({repr(value): value for value in values}.values())


def _object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}\nhint: fetch the model again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no object\nhint: fetch the model again")
    return values
