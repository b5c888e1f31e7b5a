"""Named arrays in a file, noted in its folder's SHA256SUMS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.core import sums
from thrifty.core.durable import make_folder


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An npz file of ``arrays``; its folder is made."""
    make_folder(path.parent)
    draft = path.with_suffix(".new.npz")
    plain: Any = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(draft, allow_pickle=False, **plain)
    sums.keep(draft, path)


def load_arrays(path: Path) -> dict[str, Any]:
    """What ``save_arrays`` left. Raises ValueError where it is not as it was written."""
    sums.check(path, "delete it; the same command makes it again")
    with np.load(path, allow_pickle=False) as saved:
        return dict(saved)
