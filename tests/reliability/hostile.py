"""Things that nobody should load, run or follow, and a sign that tells if somebody did."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any


class Payload:
    """Whoever unpickles it makes the file ``sign``."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sign),)


def plant(path: Path, sign: Path) -> None:
    """Put a pickle that runs something where torch's own would be."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".pt", ".pth", ".bin"):
        torch.save(Payload(sign), path)
    else:
        path.write_bytes(pickle.dumps(Payload(sign)))


def code(sign: Path) -> str:
    """A module that gives itself away when it is imported."""
    return f"import os\nos.mkdir({str(sign)!r})\nclass Evil: pass\n"


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def amend(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**held, **values}))


def safetensors(header: Any, num_bytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)
