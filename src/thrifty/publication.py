"""A trained model, left as a folder that transformers or PEFT load as it is, with a note of what it
was trained under.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from thrifty import checkpoints
from thrifty.core import sums
from thrifty.core.durable import make_folder, replace_folder
from thrifty.signals.model_folder import ADAPTER, TRAINED

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
_NOT_MODEL = ("trainer_state.json", checkpoints.MANIFEST, TRAINED)
_OF_ADAPTER = (ADAPTER, "adapter_model.safetensors", "README.md")
_NOTE = "thrifty.json"


def publish(
    checkpoint: Path,
    folder: Path,
    *,
    mark: str,
    step: int,
    make: Callable[[Path, Path], bool] | None = None,
) -> None:
    """Copy the model's own files of ``checkpoint``, which is of ``step``, to ``folder``. ``make``:
    leaves in another folder, of the checkpoint's, whole weights in place of an adapter; whether it
    did."""
    if (checkpoint / checkpoints.FOR_OTHERS).is_dir():
        checkpoint /= checkpoints.FOR_OTHERS
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    make_folder(folder.parent)
    draft.mkdir()
    made = make is not None and make(checkpoint, draft)
    left = (*_NOT_MODEL, *(_OF_ADAPTER if made else ()))
    for pattern in _MODEL_FILES:
        for file in checkpoint.glob(pattern):
            if file.name not in left:
                shutil.copy2(file, draft / file.name)
    note = json.dumps({"settings": mark, "step": step})
    (draft / _NOTE).write_text(note, encoding="utf-8")
    sums.note_all(draft)
    replace_folder(draft, folder)


def is_of(folder: Path, mark: str) -> bool:
    """Whether ``folder`` holds, whole, what was published with ``mark``."""
    note = folder / _NOTE
    if not note.is_file() or list(sums.faults(folder)):
        return False
    return bool(json.loads(note.read_text(encoding="utf-8"))["settings"] == mark)


def is_done(model: Path, mark: str) -> bool:
    """Whether ``model`` holds a model trained under the settings of ``mark``.

    Raises ValueError where it holds one trained under others.
    """
    note = model / _NOTE
    if not note.is_file():
        return False
    sums.check(note, _hint(model))
    if json.loads(note.read_text(encoding="utf-8"))["settings"] != mark:
        raise ValueError(
            f"{model} was trained under other settings, or on other rows, than plan.yaml now has\n"
            f"hint: delete {model} and the checkpoints beside it to train anew, or undo the edit"
        )
    return True


def check(model: Path) -> None:
    """Raise ValueError where a file of a model that was left is not as it was written."""
    sums.check_all(model, _hint(model))


def _hint(model: Path) -> str:
    return f"delete {model}; `thrifty run` leaves it again, from the checkpoints"
