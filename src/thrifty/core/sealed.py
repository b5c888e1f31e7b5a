"""JSON that says of itself whether it is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SEAL = "seal"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a hash of them, in place of one that is there."""
    plain = {name: value for name, value in values.items() if name != _SEAL}
    return {**plain, _SEAL: _hash(plain)}


def read_sealed(path: Path) -> dict[str, Any]:
    """The values of a file that holds ``sealed`` ones, without the seal. Raises ValueError where
    they are not as they were written, FileNotFoundError."""
    return unsealed(read_values(path), path)


def read_values(path: Path) -> dict[str, Any]:
    """As they are there. Raises ValueError, FileNotFoundError."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no values by name")
    return values


def unsealed(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Without their seal; those of an older thrifty have none. Raises ValueError where it is not
    theirs."""
    plain = {name: value for name, value in values.items() if name != _SEAL}
    if values.get(_SEAL, _hash(plain)) != _hash(plain):
        raise ValueError(f"{str(path)!r} is damaged: it is not as it was written")
    return plain


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
