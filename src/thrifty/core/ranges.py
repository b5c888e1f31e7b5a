"""The ranges of a method's numbers, checked when it is made, from plan.yaml or from Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from thrifty.core.quantities import show


def check_ranges(method: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError for the first field of the dataclass ``method`` outside its range (both ends
    included). None is no number and passes; NaN does not."""
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    for name, (least, most) in ranges.items():
        value = getattr(method, name)
        if value is None or least <= value <= most:
            continue
        wanted = f"at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise ValueError(
            f"{name} must be {wanted}, not {show(value)}\nhint: the default is {defaults[name]}"
        )
