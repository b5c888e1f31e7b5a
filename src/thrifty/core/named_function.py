"""A function of the user's own, by its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def named_function(what: str, name: str, hint: str) -> Callable[..., Any]:
    """``package.module:function``, imported; also from the folder where the command runs.

    Raises ValueError, with ``what`` asked for it and ``hint``, where there is no such function.
    """
    module, sign, function = name.partition(":")
    if not (module and sign and function):
        raise ValueError(f"{what} has no function to call: {name!r}\nhint: {hint}")
    here = str(Path.cwd())
    if here not in sys.path:  # a command's path begins where the command lies
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # other people's code: anything can go wrong
        raise ValueError(
            f"{name} cannot be imported: {type(error).__name__}: {error}\n"
            "hint: install its package, or run in the folder where the module lies"
        ) from error
    if not callable(found):
        raise ValueError(f"{name} is no function, but {found!r:.80}\nhint: {hint}")
    return found  # type: ignore[no-any-return]
